"""The floors as a table and as a picture, both made from the table in ``tests/architecture.py``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape

from tests.architecture_figures import reachable

# Sizes in pixels.
_BOX, _HEIGHT, _ROW, _MARGIN, _LABEL = 172, 46, 96, 16, 34
# Group -> fill of its rooms. A room without a group is drawn in the last colour.
_COLOURS = {
    "maths": "#dbe9f6",
    "library": "#e0f0de",
    "proof": "#fdf0cc",
    "service": "#fbe0d3",
    "command": "#e9e4f0",
}


def picture(
    floors: Sequence[Sequence[str]],
    arrows: Mapping[str, set[str]],
    contents: Mapping[str, str],
    groups: Mapping[str, str],
) -> str:
    """Draws the rooms, the lowest floor at the bottom, as an SVG document.

    Args:
        floors: rooms of each floor, the lowest first.
        arrows: room -> rooms that it imports.
        contents: room -> a few words on what is in it, drawn below its name.
        groups: room -> name of its colour.
    """
    drawn = shown(arrows)
    width = _LABEL + max(map(len, floors)) * (_BOX + _MARGIN) + _MARGIN
    height = len(floors) * _ROW + 60
    at = {
        room: (
            _LABEL + _MARGIN + _BOX / 2 + column * (_BOX + _MARGIN) / 2,
            height - 50 - _ROW * floor - _HEIGHT,
        )
        for room, (column, floor) in arranged(floors, drawn).items()
    }
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif">',
            "<title>Rooms of moe_jax by floor, and what imports what</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *_bands(len(floors), width, height),
            *_lines(drawn, at),
            *(_box(room, place, contents, groups) for room, place in at.items()),
            *_legend(height),
            "</svg>",
            "",
        ]
    )


def shown(arrows: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no detour implies: a room that is reached through another gets none."""
    return [
        (room, target)
        for room, targets in sorted(arrows.items())
        for target in sorted(targets)
        if not any(
            target in reachable(arrows, detour) and room not in reachable(arrows, detour)
            for detour in targets - {target}
        )
    ]


def arranged(
    floors: Sequence[Sequence[str]], drawn: Sequence[tuple[str, str]]
) -> dict[str, tuple[int, int]]:
    """Column and floor of each room, so that arrows are short, straight and pass beside boxes.

    A column is half a box wide, and two boxes of a floor are two columns apart or more.
    """
    columns = 2 * max(map(len, floors)) - 1
    at = {
        room: (round((columns - 1) * (place + 0.5) / len(rooms)), floor)
        for floor, rooms in enumerate(floors)
        for place, room in enumerate(rooms)
    }

    def cost() -> float:
        total = 0.0
        for room, target in drawn:
            (x, top), (end, bottom) = at[room], at[target]
            total += abs(x - end) + (20 if top <= bottom else 0)
            for column, floor in at.values():
                if bottom < floor < top:
                    crossing = end + (x - end) * (floor - bottom) / (top - bottom)
                    total += 6 * max(0.0, 1.3 - abs(column - crossing))
        return total

    # Sweeps over the floors, each by trial of every order and place: 700 at most where rooms are few.
    for _ in range(6):
        for floor, rooms in enumerate(floors):
            trials = [
                {room: (column, floor) for room, column in zip(order, places, strict=True)}
                for places in itertools.combinations(range(columns), len(rooms))
                if all(b - a >= 2 for a, b in itertools.pairwise(places))
                for order in itertools.permutations(rooms)
            ]
            costs = []
            for trial in trials:
                at.update(trial)
                costs.append(cost())
            at.update(trials[costs.index(min(costs))])
    return at


def _bands(count: int, width: float, height: float) -> list[str]:
    """A pale stripe behind every other floor, and the floor's number."""
    lines = []
    for floor in range(count):
        top = height - 50 - _ROW * floor - _HEIGHT - (_ROW - _HEIGHT) / 2
        fill = "#f7f7f7" if floor % 2 else "#ffffff"
        lines += [
            f'<rect x="0" y="{top:g}" width="{width}" height="{_ROW}" fill="{fill}"/>',
            f'<text x="10" y="{top + _ROW / 2 + 5:g}" font-size="14" fill="#999">{floor}</text>',
        ]
    return lines


def _lines(drawn: Sequence[tuple[str, str]], at: Mapping[str, tuple[float, float]]) -> list[str]:
    return [
        f'<path d="M{at[room][0]:g} {at[room][1] + _HEIGHT:g}'
        f"C{at[room][0]:g} {at[room][1] + _HEIGHT + 30:g} "
        f'{at[target][0]:g} {at[target][1] - 34:g} {at[target][0]:g} {at[target][1] - 2:g}" '
        f'fill="none" stroke="#555" stroke-width="1.2" marker-end="url(#tip)">'
        f"<title>{room} imports {target}</title></path>"
        for room, target in drawn
    ]


def _box(
    room: str,
    place: tuple[float, float],
    contents: Mapping[str, str],
    groups: Mapping[str, str],
) -> str:
    x, y = place
    fill = _COLOURS.get(groups.get(room, ""), "#e9e4f0")
    return (
        f'<rect x="{x - _BOX / 2:g}" y="{y:g}" width="{_BOX}" height="{_HEIGHT}" rx="5" '
        f'fill="{fill}" stroke="#777"/>'
        f'<text x="{x:g}" y="{y + 19:g}" text-anchor="middle" font-size="14" '
        f'font-weight="bold" fill="#222">{escape(room)}</text>'
        f'<text x="{x:g}" y="{y + 36:g}" text-anchor="middle" font-size="11" '
        f'fill="#444">{escape(contents.get(room, ""))}</text>'
    )


def _legend(height: float) -> list[str]:
    lines = []
    for place, (group, fill) in enumerate(_COLOURS.items()):
        x = _LABEL + _MARGIN + 160 * place
        lines += [
            f'<rect x="{x}" y="{height - 26}" width="14" height="14" fill="{fill}" stroke="#777"/>',
            f'<text x="{x + 20}" y="{height - 14}" font-size="12" fill="#222">{group}</text>',
        ]
    return lines
