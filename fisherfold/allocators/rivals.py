"""What simpler plans would lose, beside one that chose rank and bits of every site: so it is said where low rank pays and where plain few bits do."""

from collections.abc import Sequence
from dataclasses import dataclass

from fisherfold.allocators.cost import DENSE, SIXTEENTHS, is_rounded
from fisherfold.allocators.widths import Option, cheapest_loss


@dataclass(frozen=True)
class Rival:
    """A simpler plan: its bits, whether it cuts ranks, the bytes that it takes, half the loss that is predicted for it."""

    bits: int
    ranks: bool
    bytes: int
    loss: float


def rivals(options: Sequence[Sequence[Option]], budget: int) -> list[Rival]:
    """Every site whole in one width, for each width, at its own bytes; and ranks alone, within `budget` sixteenths of a byte, where they fit.

    Args:
        options: of every site, as `options_of` gives them.
        budget: of the plan that these are compared with.
    """
    widths = sorted({option.bits for own in options for option in own}, reverse=True)
    found = []
    for bits in filter(is_rounded, widths):
        whole = [own for site in options if (own := [o for o in site if o.storage == DENSE and o.bits == bits])]
        if len(whole) == len(options):
            found.append(_rival(bits, False, [own[0] for own in whole]))
    unrounded = [[option for option in own if not is_rounded(option.bits)] for own in options]
    if sum(min(option.cost for option in own) for own in unrounded) <= budget:
        found.append(_rival(widths[0], True, cheapest_loss(unrounded, budget)))
    return found


def _rival(bits: int, ranks: bool, chosen: Sequence[Option]) -> Rival:
    cost = sum(option.cost for option in chosen) // SIXTEENTHS
    return Rival(bits, ranks, cost, 0.5 * sum(option.loss for option in chosen))


def rivals_line(loss: float, spent: int, found: Sequence[Rival]) -> str:
    """The comparison in words."""
    told = [
        f"{'ranks alone' if rival.ranks else f'every layer whole in {rival.bits} bits'} {rival.loss:.2e} in {rival.bytes / spent:.0%} of the bytes"
        for rival in found
    ]
    return "; ".join([f"predicted loss {loss:.2e}", *told])
