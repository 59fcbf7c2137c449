"""lm-eval's transformers model, generating with `semalign_harness.generation`."""

from collections.abc import Callable

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from semalign_geometry.base import SemalignError

from ..data.encoding import TextEncoder
from ..generation import end_ids, generate
from ..models.loading import LoadedModel
from ..reading import answer_text
from ._encoded import UNLIMITED, EncodedLM


class GreedyLM(EncodedLM, HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """Generates greedily, one batch at a time, and tells each text when it ends."""

    def __init__(
        self, loaded: LoadedModel, encoder: TextEncoder, *, batch_size: int = 1, max_length: int | None = None
    ) -> None:
        """Wrap a model.

        Args:
            loaded: the model, loaded with `generates` where it will.
            encoder: turns texts into token ids, by the model's tokenizer.
            batch_size: rows of a forward run.
            max_length: longest input in tokens, the answer included; None never cuts a prompt.
        """
        self.encoder = encoder
        super().__init__(
            loaded.model,
            tokenizer=encoder.tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=UNLIMITED if max_length is None else max_length,  # lm-eval takes None for a guess of its own
        )
        self._way = loaded.way

    def generate_until(
        self,
        requests: list[Instance],
        disable_tqdm: bool = False,
        *,
        ended: Callable[[int, str], None] = lambda place, text: None,
    ) -> list[str]:
        """Texts up to their stop rules.

        Args:
            requests: of one task; they run together.
            disable_tqdm: no bar is drawn either way.
            ended: told of each request's place and its text as soon as it is complete.

        Raises:
            SemalignError: the requests ask for sampling, or for different settings.
        """
        assert self._way is not None
        settings = requests[0].args[1]
        if any(request.args[1] != settings for request in requests):
            raise SemalignError("requests that generate together must share their settings")
        if settings.get("do_sample") or settings.get("temperature"):
            raise SemalignError(f"only greedy generation is supported, not {settings}")
        rules = handle_stop_sequences(
            list(settings["until"]), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        longest = int(settings["max_gen_toks"])

        def text_of(row: list[int]) -> str:
            return str(postprocess_generated_text(answer_text(self.tokenizer, row), rules, None))

        def stopped(row: list[int]) -> bool:
            text = answer_text(self.tokenizer, row)
            return any(rule in text for rule in rules)

        rows = generate(
            self.model,
            [self.tok_encode(request.args[0], left_truncate_len=self.max_length - longest) for request in requests],
            max_new_tokens=longest,
            ends=end_ids(self.model, self.tokenizer),
            way=self._way,
            stopped=stopped,
            ended=lambda place, row: ended(place, text_of(row)),
        )
        return [text_of(row) for row in rows]
