"""The table of ranks in docs/pipeline.md is Megatron-Core's numbering, and the readers' of w2s."""

import re
from pathlib import Path

from megatron.core.parallel_state import RankGenerator

PAGE = Path(__file__).parents[2] / "docs" / "pipeline.md"
WORLD, BATCH, DATA = 8, 64, 2


def test_the_table_of_ranks() -> None:
    ranks = RankGenerator(tp=2, ep=1, dp=DATA, pp=2, cp=1, order="tp-cp-ep-dp-pp")  # parallel_state's own order

    def place(rank: int, kind: str) -> tuple[list[int], int]:
        """The group of some kind that a rank is in, and its rank there."""
        group = next(group for group in ranks.get_ranks(kind) if rank in group)
        return group, group.index(rank)

    rows = re.findall(r"^\| (\d) \| (\d), \w+ \| (\d) \| (\d) \| ([\d, ]+), \.\.\. \| (\d) \|$", PAGE.read_text(), re.M)
    assert len(rows) == WORLD
    for row in rows:
        rank, stage, data, tensor, peer = (int(row[column]) for column in (0, 1, 2, 3, 5))
        pipeline, own_stage = place(rank, "pp")
        assert (own_stage, place(rank, "dp")[1], place(rank, "tp")[1]) == (stage, data, tensor)
        assert pipeline[1 - own_stage] == peer
        reader = data + DATA * place(rank, "tp-pp")[1]  # Ranks.data_reader_rank
        assert [int(number) for number in row[4].split(",")] == list(range(reader, BATCH, WORLD))[:3]
