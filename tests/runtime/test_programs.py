"""Random programs over up to 12 sessions of one model: what any of them answers depends on its own tokens, or on its own calls, alone.

hypothesis makes the programs, cuts one that fails down to a short one, and prints that.

Two oracles, as DESIGN.md's rule of determinism has it.
1. From its tokens alone: each sequence is read once, by a fresh session, in one prefill, and every answer that a program got is compared
   with the logits at its position.  Policies that read every visible key exactly: full, streaming, on disk, and lookups whose k is all of
   them.  Other shapes of the same products run (a token beside others, chunks), so logits agree to 1e-5 of the largest one, in float32.
2. From its calls alone: a fresh session repeats the calls of a sequence, without the forks, files and other sessions between them.  Also
   for what learns from the prompt's calls or changes with them: lookups of a few keys, static keys, KIVI.  `target.deterministic` makes
   every call the same products, so every bit agrees.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, precondition, rule, run_state_machine_as_test
from torch import Tensor
from units import some_ids

import kvcompile
from kvcompile.ir.errors import SessionError
from kvcompile.ir.indexes import MIN_INDEXED_TOKENS
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.native import NO_KERNELS
from kvcompile.runtime.ring import RingStore

SESSIONS = 12  # that live at a time
ROLLBACK = 6  # what rings promise
TOLERANCE = 1e-5
VOCABULARY = 256

WINDOW = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}
STREAMING = {"zones": [WINDOW], "rollback": ROLLBACK}
DISK = {"zones": [{"all": {"device": "disk"}}]}
EXACT = {
    "streaming": STREAMING,
    "flat": {"zones": [WINDOW, {"top_k": {"k": "100%", "index": "flat"}}]},
    "sketch": {"zones": [WINDOW, {"top_k": {"k": "100%", "index": "sketch"}}]},
    "disk": DISK,
}
LEARNT = {
    "streaming": STREAMING,
    "flat": {"zones": [WINDOW, {"top_k": {"k": 24, "index": "flat"}}]},
    "sketch": {"zones": [WINDOW, {"top_k": {"k": 24, "index": "sketch", "tail": True}}]},
    "disk": DISK,
    "kivi": {"zones": ["all"], "store": {"kivi": {"bits": 4, "group": 16, "residual_tokens": 16}}},
    "static": {"zones": [WINDOW, {"static": {"keys": 24}}]},
}


POLICIES = {"exact": EXACT, "learnt": LEARNT, "window": {"streaming": STREAMING}}


@functools.cache
def compiled(name: str) -> CompiledModel:
    """Two layers of four KV heads, of which 0 is full; each other one has a policy of its own.  "window" is one layer of two heads."""
    policies = POLICIES[name]
    layers, kv_heads = (1, 2) if name == "window" else (2, 4)
    heads: list[dict[str, Any]] = [{"policy": "full"}]
    heads += [{"policy": each, "layers": place % 2, "kv_heads": 1 + place // 2} for place, each in enumerate(policies)]
    target = {"segments": "eager", "deterministic": name == "learnt"}
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "policies": policies, "heads": heads, "target": target}
    return kvcompile.compile(toys.llama(layers=layers, query_heads=2 * kv_heads, kv_heads=kv_heads), spec=spec)


def ids(count: int, seed: int) -> list[int]:
    found: list[int] = some_ids(count, VOCABULARY, seed).tolist()
    return found


# --- what is compared --------------------------------------------------------------------------------------------------------------------

Calls = tuple[tuple[str, Any], ...]  # ("prefill" | "step", token ids), ("rollback", tokens), ("make_indexes", ())
Answers = list[tuple[Calls, Tensor]]  # logits [vocabulary], with all calls that led to them
Check = Callable[[CompiledModel, Answers], None]


def tokens_of(calls: Calls) -> tuple[int, ...]:
    found: tuple[int, ...] = ()
    for kind, what in calls:
        found = found[: len(found) - what] if kind == "rollback" else found + what
    return found


def check_tokens(model: CompiledModel, answers: Answers) -> None:
    """Oracle 1.  Answers whose tokens were rolled back since are compared too, as a sequence of their own."""
    logits_TV: dict[tuple[int, ...], Tensor] = {}
    for calls, answer in sorted(answers, key=lambda each: len(tokens_of(each[0])), reverse=True):
        past = tokens_of(calls)
        longest = next((longer for longer in logits_TV if longer[: len(past)] == past), past)
        if longest is past:
            logits_TV[past] = model.session().prefill(past, logits="all")
        wanted = logits_TV[longest][len(past) - 1]
        difference = float((answer - wanted).abs().max() / wanted.abs().max())
        assert difference <= TOLERANCE, f"{told(calls)}: {difference:.1e} from the oracle"


def check_calls(model: CompiledModel, answers: Answers) -> None:
    """Oracle 2."""
    wanted: dict[Calls, Tensor] = {}
    for calls, answer in sorted(answers, key=lambda each: len(each[0]), reverse=True):
        if calls not in wanted:
            oracle = model.session()
            for number, (kind, what) in enumerate(calls, 1):
                if kind == "rollback":
                    oracle.rollback(what)
                elif kind == "make_indexes":
                    oracle.make_indexes()
                else:
                    wanted[calls[:number]] = oracle.prefill(what) if kind == "prefill" else oracle.step(what)
        assert torch.equal(answer, wanted[calls]), f"{told(calls)}: not the oracle's bits"


def told(calls: Calls) -> str:
    return " ".join(f"{kind}({what if kind == 'rollback' else len(what)})" for kind, what in calls)


# --- programs ----------------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Sequence:
    """A session, or a file of one, the calls that made it, and the most tokens that it has had: rings promise to go back ROLLBACK tokens
    from there."""

    session: kvcompile.Session | None
    calls: Calls = ()
    highest: int = 0


SEED = st.integers(0, 1 << 16)  # of token ids
LONG = st.integers(MIN_INDEXED_TOKENS, MIN_INDEXED_TOKENS + 80)  # enough for an index
COUNT = st.one_of(st.integers(1, 4), st.integers(5, 8), st.integers(9, 16), st.integers(17, 40), LONG)  # each as often as the others

another = precondition(lambda programs: len(programs.living) < SESSIONS)


class Programs(RuleBasedStateMachine):
    """Sessions of one model, whose answers are checked at the end.

    done: counts the operations, the prompts long enough for an index ("long"), and as "most" the sessions that lived at a time.
    """

    sessions = Bundle("sessions")
    files = Bundle("files")

    def __init__(self, model: CompiledModel, check: Check, folder: Path, done: Counter[str]) -> None:
        super().__init__()
        self.model = model
        self.check = check
        self.folder = folder
        self.done = done
        self.looks_up = any(group.policy.looked_up for site in model.plan.sites for group in site.groups)
        self.living: list[Sequence] = []
        self.saved: dict[str, Sequence] = {}
        self.unread = False  # whether a file was written and not read since
        self.answers: Answers = []

    def _opened(self, *sequences: Sequence) -> Any:
        self.living += sequences
        self.done["most"] = max(self.done["most"], len(self.living))
        return multiple(*sequences)

    def _answered(self, sequence: Sequence, kind: str, tokens: list[int], answer: Tensor) -> None:
        sequence.calls += ((kind, tuple(tokens)),)
        sequence.highest = max(sequence.highest, len(sequence.session))
        self.answers.append((sequence.calls, answer))

    @initialize(target=sessions, count=st.one_of(COUNT, LONG), seed=SEED)
    def first(self, count: int, seed: int) -> Any:
        opened = self.session()
        self.prefill(self.living[0], count, seed)
        return opened

    @another
    @rule(target=sessions)
    def session(self) -> Any:
        return self._opened(Sequence(self.model.session()))

    @another
    @rule(target=sessions, parent=sessions, children=st.integers(1, 4))
    def fork(self, parent: Sequence, children: int) -> Any:
        self.done["fork"] += 1
        children = min(children, SESSIONS - len(self.living))
        return self._opened(*(replace(parent, session=parent.session.fork()) for _ in range(children)))

    @rule(sequence=sessions, count=COUNT, seed=SEED)
    def prefill(self, sequence: Sequence, count: int, seed: int) -> None:
        self.done["prefill"] += 1
        self.done["long"] += count >= MIN_INDEXED_TOKENS
        tokens = ids(count, seed)
        self._answered(sequence, "prefill", tokens, sequence.session.prefill(tokens))

    @rule(sequence=sessions, seed=SEED)
    def step(self, sequence: Sequence, seed: int) -> None:
        self.done["step"] += 1
        tokens = ids(1, seed)
        self._answered(sequence, "step", tokens, sequence.session.step(tokens))

    @rule(batch=st.lists(sessions, min_size=1, max_size=SESSIONS, unique=True), seed=SEED)
    def batch_step(self, batch: list[Sequence], seed: int) -> None:
        self.done["batch_step"] += 1
        tokens = ids(len(batch), seed)
        answers = self.model.step([each.session for each in batch], tokens)
        for each, token, answer in zip(batch, tokens, answers, strict=True):
            self._answered(each, "step", [token], answer)

    @precondition(lambda programs: len(programs.living) > 1)
    @rule(seed=SEED)
    def step_all(self, seed: int) -> None:
        """Forks step beside their parents here, which a draw of a few of all sessions seldom has."""
        self.batch_step(self.living, seed)

    @rule(sequence=sessions, count=st.integers(1, ROLLBACK))
    def rollback(self, sequence: Sequence, count: int) -> None:
        self.done["rollback"] += 1
        session = sequence.session
        count = min(count, len(session))
        left = len(session) - count
        try:
            session.rollback(count)
        except SessionError:
            stores = [store for site in range(len(self.model.plan.sites)) for store in session.stores(site)]
            static = any(type(store).__name__ == "StaticStore" for store in stores)
            assert static or sequence.highest - left > ROLLBACK, "refused within what was promised"
        else:
            sequence.calls += (("rollback", count),)

    @precondition(lambda programs: programs.looks_up and programs.living)
    @rule()
    def make_indexes(self) -> None:
        """Of the longest session: few others have read enough for one."""
        sequence = max(self.living, key=lambda each: len(each.session))
        self.done["indexes"] += sequence.session.make_indexes()
        sequence.calls += (("make_indexes", ()),)

    @precondition(lambda programs: len(programs.living) > 1)
    @rule(sequence=consumes(sessions))
    def drop(self, sequence: Sequence) -> None:
        self.done["drop"] += 1
        self.living.remove(sequence)
        sequence.session = None  # hypothesis holds the sequence until the program ends

    @precondition(lambda programs: not programs.unread)
    @rule(target=files, sequence=sessions, name=st.sampled_from("ab"))
    def save(self, sequence: Sequence, name: str) -> str:
        """Also over a file that restored sessions still read."""
        self.done["save"] += 1
        self.unread = True
        sequence.session.save(self.folder / name)
        self.saved[name] = replace(sequence, session=None)
        return name

    @another
    @rule(target=sessions, name=files)
    def restore(self, name: str) -> Any:
        self.done["restore"] += 1
        self.unread = False
        return self._opened(replace(self.saved[name], session=self.model.restore(self.folder / name)))

    def teardown(self) -> None:
        if sys.exception() is not None:  # a rule's, which is to be told, and not what follows from it
            return
        assert all(tuple(sequence.session.tokens) == tokens_of(sequence.calls) for sequence in self.living)
        self.check(self.model, self.answers)
        self.done["checked"] += 1


def try_programs(count: int, model: CompiledModel, check: Check, folder: Path, **chosen: Any) -> Counter[str]:
    """Runs so many programs, the same ones each time, and returns what they did.  Raises what goes wrong in one that fails, told short.

    chosen: other settings of hypothesis.
    """
    done: Counter[str] = Counter()
    alike = settings.get_profile("default")  # where CI is set hypothesis loads another one
    usual: dict[str, Any] = {"stateful_step_count": 10, "phases": (Phase.generate, Phase.shrink)}
    fixed: dict[str, Any] = {"derandomize": True, "database": None, "deadline": None, "report_multiple_bugs": False}
    fixed["suppress_health_check"] = [HealthCheck.too_slow]  # other work on the machine is none of its concern
    run_state_machine_as_test(
        lambda: Programs(model, check, folder, done), settings=settings(alike, max_examples=count, **(usual | fixed | chosen))
    )
    return done


@pytest.fixture(autouse=True)
def _nothing_in_the_repository(tmp_path):
    """hypothesis keeps what it reads of the code in files."""
    set_hypothesis_home_dir(tmp_path / "hypothesis")
    yield
    set_hypothesis_home_dir(None)


# --- the tests ---------------------------------------------------------------------------------------------------------------------------


def test_what_a_session_answers_depends_on_its_tokens_alone(tmp_path):
    """With relay wherever sessions share 256 tokens, as a tenth of the programs' first sessions and their forks do."""
    model = compiled("exact")
    model = model.with_plan(replace(model.plan, relay="always"))
    done = try_programs(200, model, check_tokens, tmp_path)
    assert model.relay.shared > 0 or model.kernels == NO_KERNELS
    operations = {"fork", "prefill", "step", "batch_step", "rollback", "drop", "save", "restore"}
    assert min(done[operation] for operation in operations) > 5, done
    assert done["most"] == SESSIONS and done["long"] > 20 and done["indexes"] > 3
    assert done["checked"] > 180  # of the others hypothesis stopped the draw


def test_what_learns_from_its_calls_depends_on_them_alone(tmp_path):
    done = try_programs(80, compiled("learnt"), check_calls, tmp_path)
    assert min(done[name] for name in ("fork", "restore", "rollback", "long", "indexes")) > 0


def test_a_mistake_is_found_and_told_by_a_short_program(tmp_path, monkeypatch):
    """Planted: a fork writes into its parent's ring."""
    monkeypatch.setattr(RingStore, "fork", lambda store: store)
    with pytest.raises((AssertionError, SessionError)) as caught:
        try_programs(1000, compiled("window"), check_tokens, tmp_path, stateful_step_count=8)
    told = "\n".join(caught.value.__notes__)
    steps = [line for line in told.splitlines() if ")" in line and not line.endswith(("Programs()", "state.teardown()"))]
    assert len(steps) <= 8 and sum("state.fork(" in line for line in steps) == 1


def test_oracle_2_finds_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr(RingStore, "fork", lambda store: store)
    with pytest.raises((AssertionError, SessionError)) as caught:
        try_programs(200, compiled("learnt"), check_calls, tmp_path, phases=[Phase.generate])
    assert "state.fork(" in "\n".join(caught.value.__notes__)
