"""What cutting did to the training data, in words."""

from __future__ import annotations

from dist_subspace.training.data.cutting import WHOLE_SHARE, Cutting


def cutting_text(cutting: Cutting, max_length: int) -> tuple[list[str], bool]:
    """(sentences, whether they are a warning): none where every sample is whole, a warning where fewer than 95% are.

    A sample that the records gave without anything to train counts as not whole, though no length would help it.
    """

    def of_all(count: int) -> str:
        return f"{count:,} of {cutting.samples:,} samples ({_percent(count, cutting.samples)})"

    sentences = []
    if cutting.cut:
        lost, lost_each = cutting.tokens_dropped, cutting.tokens_dropped / cutting.cut
        sentences.append(
            f"data.max_length {max_length:,} cuts {of_all(cutting.cut)}: they lose {lost:,} tokens of their older text, "
            f"{lost_each:,.0f} each on average"
        )
    if cutting.left_out:
        sentences.append(
            f"{of_all(cutting.left_out)} are left out: their answer alone is longer than data.max_length {max_length:,}"
        )
    if cutting.without_target:
        sentences.append(f"{of_all(cutting.without_target)} are left out: they hold nothing to train")
    if cutting.length_95 > max_length:
        sentences.append(f"data.max_length={cutting.length_95} would keep {WHOLE_SHARE:.0%} of them whole")
    many_without_target = cutting.without_target > (1 - WHOLE_SHARE) * cutting.samples
    return sentences, bool(sentences) and (many_without_target or cutting.length_95 > max_length)


def _percent(count: int, whole: int) -> str:
    share = 100 * count / max(1, whole)
    return "below 0.1%" if share < 0.1 else f"{share:.1f}%"
