"""The size of a store is known before it is made."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_align import FinalHidden, SupervisionSettings, TopK, store_bytes

from .chain import EXAMPLES, SOURCE_WIDTH, TARGET_WIDTH, make_store, pair, source_model, target_model


@settings(max_examples=20)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
    output=st.one_of(st.just(FinalHidden()), st.builds(TopK, k=st.integers(1, 200))),
    shard_bytes=st.sampled_from([1, 10**9]),
    count=st.integers(1, len(EXAMPLES)),
)
def test_it_is_the_size_of_the_tensors(
    dtype: Any, output: Any, shard_bytes: int, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wanted = SupervisionSettings(dtype=dtype, output=output, shard_bytes=shard_bytes)
    source, examples = source_model(), EXAMPLES[:count]
    folder = tmp_path_factory.mktemp("size") / "store"
    store = make_store(source, target_model(), folder, settings=wanted, examples=examples)
    files = [*store._shards]
    taken = sum(file.get_tensor(key).nbytes for file in files for key in file.keys())  # noqa: SIM118
    taken += store.entries.nbytes + (0 if store._head is None else store._head.weight.nbytes)
    assert taken == store_bytes(
        wanted,
        examples=count,
        tokens=sum(len(ids) for ids, _ in examples),
        supervised_tokens=sum(len(ids) - prompt for ids, prompt in examples),
        layers=len(pair().paired_layers),
        width=TARGET_WIDTH,
        source_width=SOURCE_WIDTH,
        head_bytes=source.get_output_embeddings().weight.nbytes,
        entries=len(store.entries),
    )
