"""The texts of `prefix:` as tokens.  Needs the tokenizer and nothing else of a model, so that a plan counts them without weights."""

from __future__ import annotations

from typing import Any

from kvcompile.ir.errors import Problem, SpecError
from kvcompile.ir.plan import PlannedPrefix
from kvcompile.ir.spec import Prefix, SharedText
from kvcompile.runtime.prefix import system_ids


def plan_prefixes(prefix: Prefix, tokenizer: Any) -> tuple[PlannedPrefix, ...]:
    """Each behind the one that it continues.  Raises SpecError for a text without tokens, and for a system message that cannot be exact."""
    problems: list[Problem] = []
    found: dict[str, PlannedPrefix] = {}
    default = next((each.name for each in prefix.shared if each.default), prefix.shared[0].name if len(prefix.shared) == 1 else None)
    for each in prefix.shared:
        if tokenizer is None:
            mend = "Pass tokenizer= to kvcompile.compile; or take the prefix out, and fork a session that has read its token ids."
            problems.append(Problem(each.where, "the model comes without a tokenizer, so a text has no tokens.", mend))
            continue
        try:
            ids = system_ids(tokenizer, each.text) if each.chat else _text_ids(tokenizer, each)
        except ValueError as error:
            mend = "Take chat out, and write the system message as the model was trained to read it."
            problems.append(Problem(f"{each.where}.chat", f"{error}, so it cannot be read ahead of its conversations.", mend))
            continue
        if not ids:
            problems.append(Problem(each.where, f'the text of "{each.name}" has no token.', "Write more of it."))
        before = 0 if each.after is None or each.after not in found else found[each.after].tokens
        found[each.name] = PlannedPrefix(each.name, tuple(ids), each.after, before, each.name == default, each.text if each.chat else None)
    if problems:
        raise SpecError(*problems)
    return tuple(found.values())


def _text_ids(tokenizer: Any, entry: SharedText) -> list[int]:
    """With the token that begins a text where it begins one, and never one that ends it: something follows."""
    if entry.after is not None:
        return [int(token) for token in tokenizer(entry.text, add_special_tokens=False)["input_ids"]]
    ids = [int(token) for token in tokenizer(entry.text)["input_ids"]]
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and ids[-1:] == [end] and list(tokenizer(entry.text, add_special_tokens=False)["input_ids"])[-1:] != [end]:
        ids.pop()
    return ids
