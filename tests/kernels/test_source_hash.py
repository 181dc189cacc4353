"""What a kernel is known by: the tokens of its source."""

from patune.kernels.template import tokens

SOURCE = """def f(n):
    # why
    a = f"{{ {n} {f'{n!r:>{n}}'} }}" + rf"\\d{n}"
    return [a,
            "b {n}"]  # more
"""


def test_the_tokens_are_the_same_in_every_python():
    """Python 3.12 began to take f-strings apart: what was measured there would not be known here."""
    expected = ["def", "f", "(", "n", ")", ":", "a", "=", """f"{{ {n} {f'{n!r:>{n}}'} }}\"""", "+", 'rf"\\d{n}"']
    assert list(tokens(SOURCE)) == [*expected, "return", "[", "a", ",", '"b {n}"', "]"]


def test_layout_and_comments_do_not_count_and_names_do():
    assert list(tokens("x = 1  # one\n\n\nif x:\n  y(x)\n")) == list(tokens("x = 1\nif x:\n        y( x )\n"))
    assert list(tokens("x = 1\n")) != list(tokens("y = 1\n"))
