"""The supervision store: what it holds, what it does not depend on, and what it refuses."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from semalign_align import (
    FinalHidden,
    FinalStates,
    Supervision,
    SupervisionSettings,
    TopK,
    position_mask,
    supervise,
)
from semalign_attribution import IGNORE, view_of
from semalign_geometry import TopEntries, Transport, kl_divergence, top_k_divergence
from semalign_geometry.base import SemalignError
from torch import Tensor

from ..attribution.snapshot import snapshot, unsettle
from ..models import ARCHITECTURES, PADDING, collate, random_batch
from .chain import (
    EXACT,
    EXAMPLES,
    PAIRED,
    SOURCE_WIDTH,
    TARGET_DEPTH,
    TARGET_WIDTH,
    TOP,
    make_store,
    pair,
    run_plainly,
    source_model,
    supervised_of,
    target_model,
    tokens_of,
    transport_between,
)

SOURCE, TARGET = source_model(), target_model()
TRANSPORT = transport_between(SOURCE, TARGET)
LAYERS = range(1, TARGET_DEPTH + 1)
BATCH = collate(EXAMPLES)


def stored(folder: Path, *, batches: Any = None, source: Any = SOURCE, **more: Any) -> Supervision:
    """A store of the examples, in float32 unless settings say otherwise."""
    given = {"settings": TOP} | more
    return supervise(source, [BATCH] if batches is None else batches, pair(), TRANSPORT, folder, **given)


@torch.no_grad()
def expected_residuals(model: Any, transport: Transport, layer: int) -> list[Tensor]:
    """M (h_ℓ − h_{ℓ−1}) at the supervised positions of each example, each run alone."""
    paired = PAIRED[layer - 1]
    result = []
    for example in EXAMPLES:
        hidden = run_plainly(model, collate([example])).hidden
        result.append((hidden[paired] - hidden[paired - 1])[0, supervised_of(example)].float() @ transport.matrix.T)
    return result


def assert_same_store(one: Supervision, other: Supervision, **tolerance: float) -> None:
    assert len(one) == len(other)
    indices = list(range(len(one)))

    def assert_close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, check_dtype=False, **tolerance)

    for layer in LAYERS:
        a, b = one.collate(indices, layer=layer), other.collate(indices, layer=layer)
        assert a.reference is not None and b.reference is not None
        assert a.reference.dtype == b.reference.dtype
        assert_close(a.reference, b.reference)
    assert all(torch.equal(a.batch[key], b.batch[key]) for key in a.batch)
    if isinstance(a.output, TopEntries):
        assert isinstance(b.output, TopEntries) and torch.equal(a.output.ids, b.output.ids)
        assert_close(a.output.log_probs, b.output.log_probs)
        assert_close(a.output.tail, b.output.tail)
    else:
        assert isinstance(b.output, FinalStates)
        assert_close(a.output.hidden, b.output.hidden)
        assert torch.equal(a.output.head.weight.float(), b.output.head.weight.float())


# What is stored


def test_stored_residuals_are_the_transported_contributions(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", settings=SupervisionSettings(dtype="float32"))
    for layer in LAYERS:
        expected = expected_residuals(SOURCE, TRANSPORT, layer)
        for index, values in enumerate(expected):
            found = tokens_of(store, index, layer)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-4)


def test_half_precision_stores_are_the_rounded_float32_ones(tmp_path: Path) -> None:
    half = stored(tmp_path / "half", settings=SupervisionSettings(output=FinalHidden()))
    full = stored(tmp_path / "full", settings=EXACT)
    for index in range(len(EXAMPLES)):
        for layer in LAYERS:
            found, exact = tokens_of(half, index, layer), tokens_of(full, index, layer)
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, exact.to(torch.bfloat16))
        assert torch.equal(half.collate([index]).output.hidden, full.collate([index]).output.hidden.to(torch.bfloat16))


def test_a_float16_source_gives_the_float32_store_but_for_rounding(tmp_path: Path) -> None:
    half = stored(tmp_path / "half", source=source_model(dtype=torch.float16), settings=EXACT)
    full = stored(tmp_path / "full", settings=EXACT)
    for layer in LAYERS:
        found, exact = (store.collate([0, 3], layer=layer).reference for store in (half, full))
        assert found is not None and exact is not None and found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0, atol=0.02 * float(exact.abs().max()))


def test_target_layers_that_share_a_source_layer_share_its_bytes(tmp_path: Path) -> None:
    store = stored(tmp_path / "store")
    with safe_open(store.folder / store.manifest.shards[0].file, framework="pt") as shard:
        names = [name for name in shard.keys() if name.startswith("residual.")]  # noqa: SIM118
    assert sorted(names) == ["residual.1", "residual.3", "residual.6"]
    assert torch.equal(tokens_of(store, 0, 2), tokens_of(store, 0, 3))
    assert not torch.equal(tokens_of(store, 0, 1), tokens_of(store, 0, 2))


def test_the_manifest_says_what_the_store_holds(tmp_path: Path) -> None:
    store = stored(tmp_path / "store")
    manifest = store.manifest
    assert len(store) == manifest.examples == len(EXAMPLES)
    assert manifest.tokens == sum(len(ids) for ids, _ in EXAMPLES)
    assert manifest.supervised_tokens == sum(len(ids) - prompt for ids, prompt in EXAMPLES)
    assert (manifest.pairing, manifest.transport, manifest.settings) == (pair(), TRANSPORT.manifest, TOP)
    assert (manifest.entries, manifest.head_scale, manifest.head_softcap) == (97, 1.0, None)
    assert sum(shard.examples for shard in manifest.shards) == len(EXAMPLES)
    assert sorted(manifest.files) == sorted(
        file.name for file in store.folder.iterdir() if file.name != "manifest.json"
    )
    assert store.entries.tolist() == list(range(97))
    assert store.lengths.tolist() == [len(ids) for ids, _ in EXAMPLES]
    assert store.counts.tolist() == [len(ids) - prompt for ids, prompt in EXAMPLES]


def test_the_tokens_come_back_padded_on_the_right(tmp_path: Path) -> None:
    store = stored(tmp_path / "store", batches=[collate(EXAMPLES, length=20)])
    chosen = [3, 1, 1, 6]
    expected = collate([EXAMPLES[index] for index in chosen])
    batch = store.tokens(chosen)
    assert PADDING == 0 and all(torch.equal(batch[key], expected[key]) for key in expected)
    assert (batch["labels"][1] != IGNORE).sum() == 1


def test_collated_positions_reference_and_output_belong_together(tmp_path: Path) -> None:
    store = stored(tmp_path / "store")
    chosen = [2, 1, 3]
    data = store.collate(chosen, layer=4)
    assert data.positions.counts.tolist() == [5, 1, 6]
    assert data.reference is not None and data.reference.shape == (3, 6, TARGET_WIDTH)
    mask = position_mask(data.positions.counts)
    assert mask.tolist() == [[True] * count + [False] * (6 - count) for count in (5, 1, 6)]
    alone = [store.collate([index], layer=4) for index in chosen]
    torch.testing.assert_close(data.reference[mask], torch.cat([part.reference[0] for part in alone]), rtol=0, atol=0)
    assert (data.reference[~mask] == 0).all()
    for name in ("ids", "log_probs", "tail"):
        assert torch.equal(getattr(data.output, name), torch.cat([getattr(part.output, name) for part in alone]))
    answers = [EXAMPLES[index][0][EXAMPLES[index][1] :] for index in chosen]
    assert torch.equal(data.positions.labels, torch.cat(answers))
    assert store.collate(chosen).reference is None


# The output distribution


@torch.no_grad()
def dense_log_probs(model: Any, temperature: float = 1.0, entries: Tensor | None = None) -> Tensor:
    """log p of the model at the supervised positions of the examples, end to end, from the model's own logits."""
    rows = [run_plainly(model, collate([e])).logits[0, supervised_of(e)].float() for e in EXAMPLES]
    logits = torch.cat(rows)
    return ((logits if entries is None else logits[:, entries]) / temperature).log_softmax(1)


everything = list(range(len(EXAMPLES)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_entries_are_those_of_the_dense_distribution(temperature: float, tmp_path: Path) -> None:
    store = stored(tmp_path / "store", settings=TOP.model_copy(update={"temperature": temperature}))
    output = store.collate(everything).output
    assert isinstance(output, TopEntries)
    dense = dense_log_probs(SOURCE, temperature)
    best = dense.topk(8, dim=1)
    assert torch.equal(output.ids.long(), best.indices)
    torch.testing.assert_close(output.log_probs, best.values, rtol=1e-4, atol=1e-5)
    others = dense.scatter(1, best.indices, -torch.inf)
    torch.testing.assert_close(output.tail, others.logsumexp(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", ["all entries", "final_hidden"])
@pytest.mark.parametrize("shared", [None, 60])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
def test_both_ways_to_keep_the_output_give_the_exact_divergence(
    architecture: str, shared: int | None, kept: str, tmp_path: Path
) -> None:
    source, target = source_model(architecture), target_model(architecture)
    generator = torch.Generator().manual_seed(0)
    entries = None if shared is None else torch.randperm(97, generator=generator)[:shared]
    settings = SupervisionSettings(
        output=FinalHidden() if kept == "final_hidden" else TopK(k=1000), dtype="float32", temperature=1.5
    )
    transport = transport_between(source, target, entries=entries)
    store = supervise(source, [BATCH], pair(), transport, tmp_path, settings=settings, entries=entries)
    assert store.manifest.entries == (shared or 97)
    assert store.entries.tolist() == (list(range(97)) if entries is None else entries.tolist())
    data = store.collate(everything)
    view = view_of(target)
    head = view.head.select(store.entries)
    with torch.no_grad():
        hidden = view.trace(data.batch).final[data.positions.mask]
        if isinstance(data.output, TopEntries):
            assert data.output.ids.shape[1] == store.manifest.entries
            found = top_k_divergence(data.output, hidden, head, temperature=1.5)
        else:
            found = kl_divergence(data.output.hidden, data.output.head, hidden, head, temperature=1.5)
    p, q = dense_log_probs(source, 1.5, entries), dense_log_probs(target, 1.5, entries)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma2", "phi", "llama"])
def test_the_stored_head_is_the_source_head(architecture: str, tmp_path: Path) -> None:
    source, target = source_model(architecture), target_model(architecture)
    output, own = make_store(source, target, tmp_path, settings=EXACT).collate([0]).output, view_of(source).head
    assert isinstance(output, FinalStates) and torch.equal(output.head.weight, own.weight)
    head = output.head
    assert (head.scale, head.softcap, head.bias is None) == (own.scale, own.softcap, own.bias is None)
    assert own.bias is None or torch.equal(head.bias, own.bias)


def test_a_store_of_top_entries_has_no_head(tmp_path: Path) -> None:
    with safe_open(stored(tmp_path / "store").folder / "vocabulary.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["entries"]


# What the store does not depend on


@pytest.fixture(scope="module", params=[TOP, EXACT], ids=["top_k", "final_hidden"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Supervision:
    return stored(tmp_path_factory.mktemp("plain") / "store", settings=request.param)


@settings(max_examples=10)
@given(st.data(), st.sampled_from([1, 500, 2000, 2**28]))
def test_batches_padding_and_shards_make_no_difference(
    plain: Supervision, data: st.DataObject, shard_bytes: int
) -> None:
    batches, start = [], 0
    while start < len(EXAMPLES):
        size = data.draw(st.integers(1, len(EXAMPLES) - start))
        part = EXAMPLES[start : start + size]
        padding = data.draw(st.integers(0, 3))
        batches.append(collate(part, length=max(len(ids) for ids, _ in part) + padding))
        start += size
    wanted = plain.manifest.settings.model_copy(update={"shard_bytes": shard_bytes})
    with TemporaryDirectory() as folder:
        store = stored(Path(folder) / "store", batches=batches, settings=wanted)
        if shard_bytes == 1:
            assert [shard.examples for shard in store.manifest.shards] == [len(b["input_ids"]) for b in batches]
        if shard_bytes == 2**28:
            assert len(store.manifest.shards) == 1
        assert_same_store(store, plain, rtol=1e-4, atol=1e-4)


@settings(max_examples=10)
@given(st.lists(st.sampled_from(everything), min_size=1, max_size=9))
def test_any_examples_can_be_collated_in_any_order(plain: Supervision, chosen: list[int]) -> None:
    data = plain.collate(chosen, layer=3)
    assert data.reference is not None
    for row, index in enumerate(chosen):
        count = int(plain.counts[index])
        assert torch.equal(data.reference[row, :count], tokens_of(plain, index, 3))


@pytest.mark.parametrize("wanted", [TOP, EXACT], ids=["top_k", "final_hidden"])
def test_a_store_opens_as_it_was_written(wanted: SupervisionSettings, tmp_path: Path) -> None:
    written = stored(tmp_path / "deeper" / "store", settings=wanted)
    opened = Supervision.open(str(tmp_path / "deeper" / "store"))
    assert opened.manifest == written.manifest and opened.folder == written.folder
    assert_same_store(opened, written, rtol=0, atol=0)
    shutil.copytree(written.folder, tmp_path / "copy")
    assert_same_store(Supervision.open(tmp_path / "copy"), written, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_architecture_can_be_a_source(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, target = source_model(architecture, dtype=dtype), target_model(architecture, dtype=dtype)
    before = snapshot(source)
    store = make_store(source, target, tmp_path / "store", settings=EXACT)
    assert snapshot(source) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]
    # One batch in, one batch out: the same forward run, so that the values agree in every dtype.
    transport = transport_between(source, target)
    with torch.no_grad():
        hidden = run_plainly(source, BATCH).hidden
    for layer, paired in enumerate(PAIRED, 1):
        contribution = hidden[paired].float() - hidden[paired - 1].float()
        for row, example in enumerate(EXAMPLES):
            vectors = contribution[row, supervised_of(example)]
            terms = float((vectors.abs() @ transport.matrix.abs().T).max())
            expected = vectors @ transport.matrix.T
            torch.testing.assert_close(tokens_of(store, row, layer), expected, rtol=1e-4, atol=1e-6 * max(10, terms))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_and_double_precision_sources_are_taken(dtype: str, tmp_path: Path) -> None:
    wanted = SupervisionSettings(dtype=dtype)
    store = stored(tmp_path / "store", source=view_of(source_model(dtype=torch.float64)), settings=wanted)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 2**-7, "atol": 1e-2}
    assert_same_store(store, stored(tmp_path / "single", settings=wanted), **tolerance)


def test_the_identity_transport_keeps_the_width_of_the_source(tmp_path: Path) -> None:
    store = supervise(SOURCE, [BATCH], pair(), Transport.identity(SOURCE_WIDTH), tmp_path, settings=TOP)
    hidden = run_plainly(SOURCE, collate(EXAMPLES[:1])).hidden
    expected = (hidden[3] - hidden[2])[0, supervised_of(EXAMPLES[0])]
    torch.testing.assert_close(tokens_of(store, 0, 2), expected, rtol=1e-4, atol=1e-5)


# Damage


def damage(store: Path, kind: str, name: str) -> None:
    file = store / name
    content = bytearray(file.read_bytes())
    if kind == "flipped byte":
        content[-1] ^= 1
        file.write_bytes(content)
    elif kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


@pytest.mark.parametrize("kind", ["flipped byte", "truncated", "empty", "missing"])
@pytest.mark.parametrize(
    "name", ["shard-000-00000.safetensors", "shard-000-00001.safetensors", "vocabulary.safetensors"]
)
def test_damaged_files_are_named(kind: str, name: str, tmp_path: Path) -> None:
    batches = [collate(EXAMPLES[:3]), collate(EXAMPLES[3:])]
    store = stored(tmp_path / "store", batches=batches, settings=TOP.model_copy(update={"shard_bytes": 1})).folder
    damage(store, kind, name)
    problem = "is missing" if kind == "missing" else "is damaged"
    with pytest.raises(SemalignError, match=problem) as caught:
        Supervision.open(store)
    assert str(store / name) in str(caught.value)


@pytest.mark.parametrize("kind", ["truncated", "empty", "missing"])
def test_a_damaged_manifest_is_named(kind: str, tmp_path: Path) -> None:
    store = stored(tmp_path / "store").folder
    damage(store, kind, "manifest.json")
    with pytest.raises(SemalignError) as caught:
        Supervision.open(store)
    assert str(store / "manifest.json") in str(caught.value)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="does not exist") as caught:
        Supervision.open(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)


def test_examples_and_layers_out_of_range_are_refused(tmp_path: Path) -> None:
    store = stored(tmp_path / "store")
    for index in (-1, len(EXAMPLES)):
        with pytest.raises(SemalignError, match=f"example {index} does not exist: there are examples 0 to 6"):
            store.collate([0, index])
    for layer in (0, TARGET_DEPTH + 1):
        with pytest.raises(SemalignError, match=f"target layer {layer} does not exist"):
            store.collate([0], layer=layer)


# Whole or absent, and the source as found


def failing() -> Iterator[dict[str, Tensor]]:
    yield collate(EXAMPLES[:3])
    yield collate(EXAMPLES[3:5])
    raise RuntimeError("the data ended early")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("shard_bytes", [1, 2**28])
def test_an_exception_in_the_data_leaves_nothing_behind(shard_bytes: int, tmp_path: Path) -> None:
    wanted = TOP.model_copy(update={"shard_bytes": shard_bytes})
    model = source_model("gpt2")
    unsettle(model)
    before = snapshot(model)
    transport = transport_between(model, TARGET)
    with pytest.raises(RuntimeError, match="the data ended early"):
        supervise(model, failing(), pair(), transport, tmp_path / "store", settings=wanted)
    assert list(tmp_path.iterdir()) == []
    assert snapshot(model) == before
    stored(tmp_path / "store")
    kept = contents(tmp_path)
    with pytest.raises(RuntimeError, match="the data ended early"):
        supervise(model, failing(), pair(), transport, tmp_path / "store", settings=wanted)
    assert contents(tmp_path) == kept


def test_a_store_that_exists_is_replaced(tmp_path: Path) -> None:
    batches = [collate(EXAMPLES[:3]), collate(EXAMPLES[3:])]
    stored(tmp_path / "store", batches=batches, settings=TOP.model_copy(update={"shard_bytes": 1}))
    replaced = stored(tmp_path / "store", batches=[collate(EXAMPLES[:2])], settings=EXACT)
    assert len(Supervision.open(tmp_path / "store")) == len(replaced) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert len(list((tmp_path / "store").iterdir())) == 3


@pytest.mark.parametrize("wanted", [TOP, EXACT], ids=["top_k", "final_hidden"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_source_is_left_as_found(architecture: str, wanted: SupervisionSettings, tmp_path: Path) -> None:
    model = source_model(architecture)
    unsettle(model)
    before = snapshot(model)
    supervise(model, [BATCH], pair(), transport_between(model, TARGET), tmp_path, settings=wanted)
    assert snapshot(model) == before


def test_dropout_does_not_reach_the_store(tmp_path: Path) -> None:
    model, target = source_model("gpt2"), target_model("gpt2")
    quiet = make_store(model, target, tmp_path / "quiet")
    model.train()
    assert_same_store(make_store(model, target, tmp_path / "training"), quiet, rtol=0, atol=0)


def test_the_source_is_left_as_found_when_a_layer_fails(tmp_path: Path) -> None:
    model = source_model()
    unsettle(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("the layer failed")

    view_of(model).layer(5).register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="the layer failed"):
        supervise(model, [BATCH], pair(), TRANSPORT, tmp_path / "store")
    assert snapshot(model) == before and list(tmp_path.iterdir()) == []


# Refusals


def test_a_pairing_for_another_depth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="the pairing is for 7 source layers, the source has 6"):
        supervise(SOURCE, [BATCH], pair(source_depth=7), TRANSPORT, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_transport_of_another_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="the transport takes width 32, the source's is 48"):
        supervise(SOURCE, [BATCH], pair(), transport_between(TARGET, SOURCE), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_no_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="no examples to supervise"):
        stored(tmp_path / "store", batches=iter([]))
    assert list(tmp_path.iterdir()) == []


def test_batches_without_rows_hold_no_examples(tmp_path: Path) -> None:
    nothing = {key: value[:0] for key, value in BATCH.items()}
    with pytest.raises(SemalignError, match="no examples to supervise"):
        stored(tmp_path / "empty", batches=[nothing])
    store = stored(tmp_path / "store", batches=[nothing, BATCH, nothing])
    assert_same_store(store, stored(tmp_path / "plain"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("place", "wanted"), [("layer", TOP), ("layer", EXACT), ("norm", TOP), ("norm", EXACT), ("head", TOP)]
)
def test_sources_that_compute_nonsense_are_refused(place: str, wanted: SupervisionSettings, tmp_path: Path) -> None:
    model = source_model()
    view = view_of(model)
    part = {"layer": view.layer(2), "norm": view.final_norm, "head": model.lm_head}[place]
    next(iter(part.parameters())).data.flatten()[0] = torch.nan
    with pytest.raises(SemalignError, match="values that are not finite: check its weights and dtype"):
        supervise(model, [BATCH], pair(), TRANSPORT, tmp_path / "store", settings=wanted)
    assert list(tmp_path.iterdir()) == []


def test_an_example_without_an_answer_is_refused(tmp_path: Path) -> None:
    batch = random_batch(0)
    batch["labels"][1] = IGNORE
    with pytest.raises(SemalignError, match="example 1 of the batch has no answer token"):
        stored(tmp_path / "store", batches=[batch])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entries", [[3, 97], [-1, 5], []])
def test_entries_outside_of_the_head_are_refused(entries: list[int], tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="entries"):
        stored(tmp_path / "store", entries=torch.tensor(entries, dtype=torch.long))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [None, "key"])
def test_a_store_grows_where_a_link_leads(key: str | None, tmp_path: Path) -> None:
    there = tmp_path / "large" / "there"
    there.mkdir(parents=True)
    (tmp_path / "link").symlink_to(there)
    store = stored(tmp_path / "link", resume_key=key)
    assert len(store) == len(EXAMPLES) and (tmp_path / "link").is_symlink()
    assert (there / "manifest.json").is_file() and [entry.name for entry in there.parent.iterdir()] == ["there"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["large", "link"]
