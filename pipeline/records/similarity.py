"""``similarity.json``: how alike languages look to each layer."""

from pipeline.records.record import Record


class Similarity(Record):
    """Similarities of languages by layer (LayerMoE, arXiv 2505.22582, section 3.1).

    Attributes:
        old: the languages that the model knows.
        new: the languages to teach it.
        tokens: how many tokens of each language were read; none where a published file does not say.
        pairs: for "a&b" (and "a&a"), the mean cosine over all pairs of tokens, per layer.
        by_layer: S_l.
    """

    old: list[str]
    new: list[str]
    tokens: dict[str, int]
    pairs: dict[str, list[float]]
    by_layer: list[float]
