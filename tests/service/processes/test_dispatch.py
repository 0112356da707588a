from __future__ import annotations

import pytest

from service.processes.dispatch import Part, share


@pytest.mark.parametrize(
    ("lengths", "loads", "most_parts", "turn", "parts"),
    [
        ([5], [0], 1, 0, [(0, 0, 1)]),
        ([5, 5], [9, 3, 7], 1, 0, [(1, 0, 2)]),  # whole, to the one that has least to do
        ([5], [4, 4, 4], 1, 0, [(0, 0, 1)]),  # in turn, among equals
        ([5], [4, 4, 4], 1, 2, [(2, 0, 1)]),
        ([5], [4, 3, 3], 1, 2, [(2, 0, 1)]),
        ([5], [4, 3, 3], 1, 3, [(1, 0, 1)]),
        ([10] * 4, [0, 0], 2, 0, [(0, 0, 2), (1, 2, 4)]),
        ([10] * 4, [0, 0], 2, 1, [(1, 0, 2), (0, 2, 4)]),
        ([10] * 4, [20, 0], 2, 0, [(1, 0, 3), (0, 3, 4)]),  # 30 and 10 make 30 each
        ([10] * 4, [90, 0], 2, 0, [(1, 0, 4)]),  # one has less to do with all of it than the other without
        ([10] * 4, [0, 0, 0], 2, 0, [(0, 0, 2), (1, 2, 4)]),
        ([10, 10], [0, 0, 0], 9, 0, [(0, 0, 1), (1, 1, 2)]),
        ([90, 10, 10, 10], [0, 0], 2, 0, [(0, 0, 1), (1, 1, 4)]),
        ([10, 10, 10, 90], [0, 0], 2, 0, [(0, 0, 3), (1, 3, 4)]),
        ([10] * 6, [31, 0, 15], 3, 0, [(1, 0, 4), (2, 4, 6)]),  # 35, 20 and 4 of 60: the last is less than half a row
        ([7], [0, 0], 0, 0, [(0, 0, 1)]),
    ],
)
def test_the_least_loaded_share_a_request(
    lengths: list[int], loads: list[int], most_parts: int, turn: int, parts: list[tuple[int, int, int]]
) -> None:
    assert share(lengths, loads, most_parts, turn) == [Part(*part) for part in parts]


def test_every_row_has_one_place_and_the_load_is_level() -> None:
    lengths = [1 + (7 * row) % 200 for row in range(500)]
    for loads in ([0, 0, 0, 0], [5000, 0, 2500, 100], [10**6, 3, 10**6, 0]):
        parts = share(lengths, loads, 4, 0)
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(500))
        assert all(part.start < part.stop for part in parts)
        after = dict(enumerate(loads))
        for part in parts:
            after[part.engine] += sum(lengths[part.start : part.stop])
        worked = [after[part.engine] for part in parts]
        assert max(worked) - min(worked) <= 2 * max(lengths)
        assert all(after[engine] >= min(worked) - max(lengths) for engine in after)
