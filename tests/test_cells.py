"""What a cell is made of: fields that tables and command lines name, and unsteered cells that all methods share."""

import pytest

from austeer.errors import AUSteerError
from experiments.cell import PairsSpec, bench_of, cell_of


def test_a_field_that_no_cell_has_is_named():
    with pytest.raises(AUSteerError, match=r"a cell has no field alphs, color; its fields: .*alphas.*task"):
        cell_of(model="embedded", task="svamp", method="causal", alphs=[1.0], color="red")


def test_fields_go_to_their_part():
    cell = cell_of(model="M", task="copa", method="caa", site="layer", ks=[1, 2], n_pairs=9, limit=3,
                   options=[["caa.readout", "answer"], ["iti.norm", "x"]])  # fmt: skip
    assert (cell.model.name, cell.task.limit, cell.task.pairs.n_pairs) == ("M", 3, 9)
    assert cell.search.ks == (1, 2) and cell.method.options == (("readout", "answer"),), (
        "options of its own method only"
    )
    assert bench_of(model="M", task="copa", n_pairs=9, limit=3) == (cell.model, cell.task)


def test_unsteered_cells_do_not_depend_on_pairs_methods_or_searches():
    shared = {"model": "embedded", "task": "svamp", "limit": 5}
    one = cell_of(**shared, method="causal", site="ffn", n_pairs=20, ks=[4], encoder="tfidf")
    other = cell_of(**shared, method="iti", site="attention", search="racing", general_pairs=True)
    assert one.unsteered() == other.unsteered() == cell_of(**shared, method="vanilla", n_pairs=7)
    assert one.unsteered().task.pairs == PairsSpec() and not one.unsteered().steered and one.steered
    assert hash(one.unsteered()) == hash(other.unsteered())
