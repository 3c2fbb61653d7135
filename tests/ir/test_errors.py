from kvcompile.ir.errors import KvcompileError, Problem, SessionError, SpecError


def test_a_problem_says_where_what_and_how_to_mend():
    assert str(Problem("a.yaml:3: heads", "is wrong.", "Write it right.")) == "a.yaml:3: heads: is wrong.\n  Write it right."
    assert str(Problem("", "is wrong.", "")) == "is wrong."


def test_an_error_holds_every_problem():
    error = SpecError(Problem("a", "one.", "x"), Problem("b", "two.", "y"))
    assert str(error) == "a: one.\n  x\nb: two.\n  y"
    assert [problem.where for problem in error.problems] == ["a", "b"]


def test_wrong_values_are_value_errors():
    assert issubclass(SpecError, ValueError) and issubclass(SessionError, ValueError)
    assert isinstance(SpecError.at("a", "b", "c"), KvcompileError)
