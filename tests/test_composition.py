"""The tables of docs/composition.md are those of this tree."""

import pytest

from tests import composition


def test_the_document_holds_the_tables_of_this_tree():
    assert composition.document() == composition.DOCUMENT.read_text(), (
        "run: python -m tests.composition --write"
    )


def test_a_refusal_is_a_cell_with_its_sentence():
    def refuse():
        raise ValueError("x: expected 1,\n got 2. Pass 1.")

    def fail():
        raise TypeError("JAX did not like this")

    assert composition.cell(refuse) == "x: expected 1, got 2. Pass 1."
    assert composition.cell(lambda: None) == "yes"
    with pytest.raises(TypeError, match="JAX did not"):
        composition.cell(fail)
