"""Parts of whole anchor terms, as `resident.load` makes them from files."""

from daa_ext.fragments import Fragment
from daa_ext.lowrank import AnchorTerm, LowRank
from daa_ext.parts import DensePart, FactorPart, Part


def part_of(term: AnchorTerm, fragment: Fragment) -> Part:
    """The part of a whole anchor term that belongs to `fragment`, on the term's device."""
    if isinstance(term, LowRank):
        first, last = fragment.rows
        US_mR = term.U_MR[first:last] * term.S_R
        Vt_RN = term.Vt_RN
        return FactorPart(US_mR, fragment.columns, fragment.skipped, lambda: Vt_RN, Vt_RN.nbytes)
    return DensePart(term.values.reshape(-1)[fragment.start : fragment.start + fragment.numel])
