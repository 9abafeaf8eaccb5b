"""``shared_stage.json``: which run of a sweep trains stage 1 for this one too."""

from pipeline.records.record import Record


class SharedStage(Record):
    """Written when a sweep begins, read when stage 1 does.

    Attributes:
        trained_by: the folder of the other run.
    """

    trained_by: str
