"""`CompiledModel.as_transformers()`: a compiled model as transformers sees one, for code that has `generate()` around it.

    hf = kvcompile.compile("duo.yaml").as_transformers()
    hf.generate(ids, num_beams=4)          # greedy, sampling, beams, assisted decoding in both roles, prompt lookup, streamers
    pipeline("text-generation", model=hf, tokenizer=...)
    HFLM(pretrained=hf, tokenizer=...)     # of lm-eval

Rows are sessions (runtime/rows.py): tokens of padding are never read, equal prompts are read once, and a beam that is
taken twice is a fork.  There are no parameters here to train, move or save; what needs them is refused by name.

Letters: B rows, T tokens read before and now, S now, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.original import OriginalFacts
from kvcompile.rows_cache import RowsCache
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.rows import ReadRows
from kvcompile.runtime.session import Session

_IGNORED_LABEL = -100  # transformers' number for labels that do not count


class SessionCache(RowsCache):
    """What `past_key_values` is here: a session a row.

    sessions: of `model`, to go on with, in place; give forks to keep them as they are.  None: the first call makes a row each.
    `copy.deepcopy` of a cache forks its rows.
    """

    def __init__(self, model: CompiledModel, sessions: Sequence[Session] = ()) -> None:
        self.rows = ReadRows(model, sessions)
        super().__init__(self.rows)

    def update(self, *args: Any, **keywords: Any) -> NoReturn:
        raise SessionError(
            Problem("past_key_values", "another model was given the cache of a compiled one.", "Give it the model that made the cache.")
        )

    def activate_past_recording(self) -> None:
        """transformers says that it will take tokens back.  Raises SessionError where a ring keeps none for that."""
        if not self.is_croppable:
            raise SessionError(
                Problem(
                    "generate",
                    "assisted decoding takes tokens back, and a policy of the spec does not keep what that needs.",
                    "Write `rollback: 32`, more than are guessed at once, in each policy that has a window, or use no assistant.",
                )
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionCache:
        copied = SessionCache(self.rows.model)
        copied.rows = copied._rows = self.rows.forked()
        copied.layers = [type(layer)(copied.rows) for layer in self.layers]
        memo[id(self)] = copied
        return copied


class KvcompileConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not followed
    """The configuration of a module that has none of its own."""

    model_type = "kvcompile"


def _refused(what: str, mend: str) -> Callable[..., NoReturn]:
    """A method of PreTrainedModel that means nothing here."""

    def method(self: Any, *args: Any, **keywords: Any) -> NoReturn:
        raise SessionError(Problem("as_transformers", what, mend))

    return method


_COMPILE_AGAIN = "Change the original model, then compile it."
_NO_WEIGHTS = "a compiled model has no weights to save."
_NO_MODULES = "a compiled model has no embeddings of its own."
_NO_COPY = "a compiled model can be neither copied nor pickled."
_NO_TRAINING = "a compiled model cannot be trained."


class KvcompileForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A compiled model with the face of transformers' causal language models; made by `CompiledModel.as_transformers`.

    compiled: the model itself.  config, generation_config: copies of the original's.
    """

    config_class = KvcompileConfig

    def __init__(self, compiled: CompiledModel, original: OriginalFacts) -> None:
        config = copy.deepcopy(original.config) if original.config is not None else _config_of(compiled)
        config._attn_implementation = "eager"  # nobody reads it here; the original's may need a package or a GPU
        super().__init__(config)
        self.name_or_path = compiled.name
        self.compiled = compiled
        self._original = original
        if original.generation_config is not None:
            self.generation_config = copy.deepcopy(original.generation_config)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where ids are wanted and logits appear."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; logits are float32 all the same."""
        return self._original.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The original's."""
        if exclude_embeddings:
            raise SessionError(Problem("num_parameters", _NO_MODULES, "Leave out exclude_embeddings, or ask the original model."))
        return 0 if only_trainable else self._original.parameters

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of weights; what sessions hold, a cache's nbytes() tells."""
        return self.compiled.plan.weight_bytes

    def tie_weights(self, *args: Any, **keywords: Any) -> None:
        """The original's were tied when it was compiled."""

    def new_cache(self, sessions: Sequence[Session] = ()) -> SessionCache:
        """An empty cache, or one that goes on with these sessions of the compiled model, a row each."""
        return SessionCache(self.compiled, sessions)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **keywords: Any,
    ) -> Any:
        """CausalLMOutputWithPast of the next S tokens of each row; without past_key_values each row is a new session.

        input_ids:      [B, S].  What the mask hides is read by nobody and may be any number.
        attention_mask: [B, T], 0 where there is padding, on either side or between; None: nowhere.
        position_ids:   each row's own count of tokens, from 0; nothing else is possible, so they need not be given.
        labels:         [B, S]: `loss` is the mean cross entropy (natural log) of each label under the logits one place before it.
        logits_to_keep: logits of that many last tokens (0: all), or of these places.
        logits: float32 [B, kept, V], 0 where there is padding.
        Positions count a row's own tokens, as in generate(), and the loss their labels, wherever padding lies.  (A bare call of an original
        counts padding as tokens unless position_ids say otherwise, and takes the loss over it unless labels are -100 there.)
        Raises SessionError for everything else that is not None or False, by its name; but for `tokenizer`, which generate() hands on when
        it looks for stop strings, as if every model took it.
        """
        _refuse_options({**{name: value for name, value in keywords.items() if name != "tokenizer"}, "inputs_embeds": inputs_embeds})
        ids_BS = _checked_ids(input_ids)
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True))
        cache = self._cache(past_key_values)
        real_BS = _new_real(attention_mask, ids_BS, cache.rows)
        _check_positions(position_ids, ids_BS, real_BS, cache.rows)
        if not isinstance(logits_to_keep, Tensor) and logits_to_keep < 0:
            what = f"{logits_to_keep} is less than 0."
            raise SessionError(Problem("logits_to_keep", what, "Give a number of last tokens, 0 for all, or the places."))
        keep = 0 if isinstance(logits_to_keep, Tensor) or labels is not None else logits_to_keep
        _check_last(real_BS, keep)
        _check_labels(labels, ids_BS)
        logits_BKV = cache.rows.read(ids_BS, real_BS, keep)
        loss = None if labels is None else _loss(logits_BKV, labels, real_BS)
        if isinstance(logits_to_keep, Tensor):
            logits_BKV = logits_BKV[:, logits_to_keep]
        elif labels is not None and logits_to_keep:
            logits_BKV = logits_BKV[:, -logits_to_keep:]
        keeps = use_cache or past_key_values is not None
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BKV, past_key_values=cache if keeps else None)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    def _cache(self, given: Any) -> SessionCache:
        if given is None:
            return SessionCache(self.compiled)
        if not isinstance(given, SessionCache):
            raise SessionError(
                Problem(
                    "past_key_values",
                    f"a {type(given).__name__} cannot hold the sessions of a compiled model.",
                    "Leave it out, or give what new_cache() or an earlier call returned.",
                )
            )
        made = given.rows.model
        if made.program is not self.compiled.program or made.plan is not self.compiled.plan:
            raise SessionError(
                Problem("past_key_values", "the cache belongs to another compiled model.", "Give it this model's new_cache().")
            )
        return given

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *sizes: Any, **keywords: Any) -> None:
        """What generate() makes of its options before it begins: transformers would make a DynamicCache here."""
        _refuse_generation(generation_config)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = SessionCache(self.compiled)
        if model_kwargs.get("past_key_values") is not None:
            cache = self._cache(model_kwargs["past_key_values"])
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def train(self, mode: bool = True) -> KvcompileForCausalLM:
        if mode:
            raise SessionError(Problem("as_transformers", _NO_TRAINING, "Train the original model, then compile it."))
        super().train(False)
        return self

    def to(self, *args: Any, **keywords: Any) -> KvcompileForCausalLM:
        """Itself, where nothing is to be moved.  Raises SessionError for another device or dtype."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **keywords)
        if device is not None and device.type != "cpu":
            raise SessionError(Problem("as_transformers", f"a compiled model cannot move to {device}.", "Leave it on the CPU."))
        return self._in(self.dtype if dtype is None else dtype)

    def half(self) -> KvcompileForCausalLM:
        return self._in(torch.float16)

    def bfloat16(self) -> KvcompileForCausalLM:
        return self._in(torch.bfloat16)

    def float(self) -> KvcompileForCausalLM:
        return self._in(torch.float32)

    def double(self) -> KvcompileForCausalLM:
        return self._in(torch.float64)

    def _in(self, dtype: torch.dtype) -> KvcompileForCausalLM:
        if dtype != self.dtype:
            what = f"a compiled model computes in {self.dtype} and cannot change to {dtype}."
            raise SessionError(Problem("as_transformers", what, "Write `model: {dtype: ...}` in the spec, or cast the original model."))
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Neither copied nor pickled, as the compiled model."""
        raise SessionError(Problem("as_transformers", _NO_COPY, "Call as_transformers() for another one: it holds no weights of its own."))

    cuda = _refused("a compiled model cannot move to a GPU.", "Leave it on the CPU.")
    save_pretrained = _refused(_NO_WEIGHTS, "Save the original model, and the spec.")
    push_to_hub = _refused(_NO_WEIGHTS, "Push the original model, and the spec.")
    state_dict = _refused(_NO_WEIGHTS, "Ask the original model.")
    load_state_dict = _refused("the weights of a compiled model are fixed.", _COMPILE_AGAIN)
    resize_token_embeddings = _refused("the vocabulary of a compiled model is fixed.", _COMPILE_AGAIN)
    get_input_embeddings = get_output_embeddings = _refused(_NO_MODULES, "Ask the original model.")
    set_input_embeddings = set_output_embeddings = _refused(_NO_MODULES, _COMPILE_AGAIN)
    set_attn_implementation = set_experts_implementation = _refused(
        "a compiled model has its own attention.", "Write policies in the spec."
    )
    add_adapter = load_adapter = _refused(
        "an adapter changes weights, which are compiled.", "Merge it into the original model, then compile it."
    )
    gradient_checkpointing_enable = enable_input_require_grads = _refused(_NO_TRAINING, "Train the original model, then compile it.")
    generate_batch = init_continuous_batching = _refused(
        "transformers' continuous batching wants pages of keys.", "Use generate(), or step() of the compiled model with several sessions."
    )


AutoModelForCausalLM.register(KvcompileConfig, KvcompileForCausalLM)  # so that pipelines know the name


def _config_of(compiled: CompiledModel) -> Any:
    stops = sorted(compiled.stop_tokens)
    return KvcompileConfig(
        vocab_size=compiled.vocabulary,
        num_hidden_layers=len(compiled.plan.sites),
        max_position_embeddings=compiled.plan.position_rows or compiled.plan.context_tokens,
        bos_token_id=None,
        eos_token_id=stops or None,
        pad_token_id=None,
    )


def _refuse_options(given: dict[str, Any]) -> None:
    problems = [
        Problem(name, "a compiled model cannot honour it.", "Leave it out, or ask the original model.")
        for name, value in given.items()
        if value is not None and value is not False
    ]
    if problems:
        raise SessionError(*problems)


def _refuse_generation(config: Any) -> None:
    """Options of generate() that reach into a model or choose another cache."""
    unknown = {
        "cache_implementation": None if config.cache_implementation == "dynamic" else config.cache_implementation,
        "assistant_early_exit": config.assistant_early_exit,
        "use_mtp": getattr(config, "use_mtp", None),
        "speculation_type": getattr(config, "speculation_type", None) if getattr(config, "speculation_type", None) == "dflash" else None,
    }
    _refuse_options(unknown)


def _checked_ids(input_ids: Tensor | None) -> Tensor:
    mend = "Give token ids [rows, tokens]."
    if input_ids is None:
        raise SessionError(Problem("input_ids", "there are none.", mend))
    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point() or input_ids.is_complex():
        what = f"a tensor of shape {list(input_ids.shape)} and {input_ids.dtype} is no batch of token ids."
        raise SessionError(Problem("input_ids", what, mend))
    if input_ids.device.type != "cpu":
        raise SessionError(Problem("input_ids", f"they are on {input_ids.device}, the model on the CPU.", "Move them: input_ids.cpu()."))
    return input_ids


def _new_real(mask: Tensor | None, ids_BS: Tensor, rows: ReadRows) -> Tensor | None:
    """bool [B, S] of the new tokens, None where all are real."""
    if mask is None:
        return None
    size, new = list(ids_BS.shape), ids_BS.shape[1]
    wanted = [size[0], rows.tokens + new]
    if not isinstance(mask, Tensor) or list(mask.shape) != wanted:
        found = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise SessionError(
            Problem(
                "attention_mask",
                f"it is {found}, and {size[0]} rows of {rows.tokens} tokens read before and {new} new ones want {wanted}.",
                "Give 1 for each token and 0 for padding, or leave it out.  Masks of four dimensions are in the compiled model.",
            )
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise SessionError(Problem("attention_mask", "it holds other numbers than 0 and 1.", "Give 1 for each token and 0 for padding."))
    real_BT = mask.bool().cpu()
    if rows.rows and not torch.equal(real_BT[:, : rows.tokens], rows.real()):
        raise SessionError(
            Problem(
                "attention_mask",
                "it hides or shows other tokens of the past than when they were read.",
                "Give the mask of the earlier calls, with the new tokens' behind it.",
            )
        )
    real_BS = real_BT[:, rows.tokens :]
    if not bool(real_BS.any()):
        raise SessionError(Problem("attention_mask", "it hides every new token of every row.", "Give 1 for each token and 0 for padding."))
    return None if bool(real_BS.all()) else real_BS


def _check_positions(positions: Tensor | None, ids_BS: Tensor, real_BS: Tensor | None, rows: ReadRows) -> None:
    """A session counts for itself; a caller may say the same."""
    if positions is None:
        return
    real = torch.ones_like(ids_BS, dtype=torch.bool) if real_BS is None else real_BS
    before_B = rows.real().sum(1) if rows.rows else torch.zeros(len(ids_BS), dtype=torch.int64)
    if before_B.shape[0] != len(ids_BS):
        return  # another number of rows, which `read` refuses
    wanted_BS = before_B[:, None] + real.cumsum(1) - 1
    if positions.shape not in (ids_BS.shape, (1, ids_BS.shape[1])) or bool(((positions.cpu() != wanted_BS) & real).any()):
        raise SessionError(
            Problem(
                "position_ids",
                "a session's tokens stand at 0, 1, 2 and so on, padding not counted.",
                "Leave them out, or give (attention_mask.cumsum(-1) - 1) of the new tokens.",
            )
        )


def _check_last(real_BS: Tensor | None, keep: int) -> None:
    if real_BS is None or keep == 0 or bool(real_BS[:, -1].all()):
        return
    row = int((~real_BS[:, -1]).nonzero()[0])
    raise SessionError(
        Problem(
            "attention_mask",
            f"row {row} ends with padding, and the logits of its last token are asked for.",
            "Pad on the left: tokenizer.padding_side = 'left'.  For scoring leave logits_to_keep out: then padding may stand anywhere.",
        )
    )


def _check_labels(labels: Tensor | None, ids_BS: Tensor) -> None:
    if labels is not None and labels.shape != ids_BS.shape:
        what = f"they are of shape {list(labels.shape)}, the ids of {list(ids_BS.shape)}."
        raise SessionError(Problem("labels", what, "Give one for each token, -100 where it does not count."))


def _loss(logits_BSV: Tensor, labels_BS: Tensor, real_BS: Tensor | None) -> Tensor:
    """Mean over labels that count; of padding and of the token behind it none does."""
    wanted = labels_BS[:, 1:]
    if real_BS is not None:
        wanted = wanted.masked_fill(~(real_BS[:, 1:] & real_BS[:, :-1]), _IGNORED_LABEL)
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=_IGNORED_LABEL)


__all__ = ["KvcompileConfig", "KvcompileForCausalLM", "SessionCache"]
