"""The parsers of both roles, against bytes that nobody meant well.

A target takes any bytes, decodes them into what one peer sends (`decoder`), feeds that to a parser
whole and in pieces, and says in a word how far it got. It fails if the parser

- raises anything but the protocol's own errors,
- keeps more than its bound,
- comes to another result when the same bytes are split differently, or
- does not end (the run's time limit says so).

The same targets run three ways: under Hypothesis and over the kept corpus in the default run of
the tests, and under atheris, which looks for inputs that reach new code:

    python -m tests.fuzz [TARGET ...] [--seconds N]

The corpus is `fixtures/corpus/TARGET/`. A file with a name of hexadecimal digits came from atheris and
may go when the corpus is minimised; one with a telling name is kept: an error found once, or an
input that reaches what chance does not.

To add a target: a function from bytes to a word, and a row in `targets.TARGETS`.
"""
