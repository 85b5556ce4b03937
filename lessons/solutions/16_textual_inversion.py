"""Answers of lesson 16."""

import torch

from lessons.exercises import Exercise, difference


def embed(ids, table, new):
    return torch.cat([table, new])[ids]


def check_embed(function) -> str | None:
    """Of two captions with two new vectors, beside words from both ends of the table."""
    table = torch.arange(12.0).reshape(6, 2)
    new = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    ids = torch.tensor([[0, 6, 7, 5], [1, 5, 6, 2]])
    mistakes = {
        "puts the new vectors before the table, so that every known word becomes another: they follow it": new_first(ids, table, new),
        "gives new vector 0 for every new id: id 6 is row 0 of new, id 7 is row 1": always_the_first(ids, table, new),
        "takes the last row of the table for the new ids; new is not used": last_row(ids, table, new),
        "gives the new vectors in the wrong order: id 6 is row 0 of new, id 7 is row 1": turned_round(ids, table, new),
    }
    return difference(function(ids, table, new), embed(ids, table, new), mistakes)


def new_first(ids, table, new):
    return torch.cat([new, table])[ids]


def always_the_first(ids, table, new):
    return torch.where((ids >= len(table))[..., None], new[0], table[ids.clamp(max=len(table) - 1)])


def last_row(ids, table, new):
    return table[ids.clamp(max=len(table) - 1)]


def turned_round(ids, table, new):
    return torch.cat([table, new.flip(0)])[ids]


def into_the_table(ids, table, new):
    rows = torch.cat([table, new])[ids]
    table[-len(new) :] = new
    return rows


EXERCISES = (
    Exercise(
        embed,
        check_embed,
        wrong=(
            (new_first, "before the table"),
            (always_the_first, "gives new vector 0 for every"),
            (last_row, "takes the last row"),
            (turned_round, "wrong order"),
            (into_the_table, "changes its argument table in place"),
        ),
    ),
)
