"""The picture: a readable PNG for every ledger, the same bytes each time, labels that lie over nothing."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image

from fedlens.report import draw_overview, save_overview
from fedlens.report.labels import Label, along, place_labels, shorten


def pixels(picture: bytes) -> np.ndarray:
    return image.imread(io.BytesIO(picture))[..., :3]


def test_the_picture_is_a_png_of_twice_the_usual_resolution(make_ledger):
    drawn = pixels(draw_overview(make_ledger()))
    assert drawn.shape == (1040, 2400, 3)
    assert 0.02 < np.mean(np.any(drawn < 0.98, axis=2)) < 0.2  # neither empty nor cluttered


def test_it_is_saved_in_the_ledger_and_gives_the_same_bytes_again(make_ledger):
    ledger = make_ledger()
    path = save_overview(ledger)
    assert path == ledger.path / "overview.png"
    first = path.read_bytes()
    assert save_overview(ledger).read_bytes() == first
    assert b"Software" not in first
    assert b"Date" not in first
    assert ledger.state == "complete"  # the reader does not mind the picture
    assert sorted(file.name for file in ledger.path.iterdir()) == ["checkpoints", "overview.png", "rounds", "run.json"]


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 1, "ids": ("ann",), "checkpoint": False},
        {"rounds": 1, "shapes": {"w": (1,)}},
        {"ids": ("$x_1$", "名前/..\n", "a" * 80, "\x1b[31m")},
        {"ids": tuple(f"client-{number}" for number in range(40))},
        {"metrics": lambda number: {"loss": math.nan if number == 3 else 1.0}},
        {"metrics": lambda number: {"accuracy": math.nan}},
        {"metrics": lambda number: {}},
        {"change": lambda number, stacks: [stack.fill(0) for stack in stacks]},
        {"change": lambda number, stacks: stacks[0].__imul__(np.float32(1e30))},
    ],
    ids=["one round", "one weight", "odd ids", "many clients", "nan", "all nan", "no metrics", "equal", "huge"],
)
def test_every_ledger_can_be_drawn(make_ledger, options):
    assert pixels(draw_overview(make_ledger(**options))).std() > 0.01


def test_accuracy_is_drawn_rather_than_loss_and_held_out_rather_than_training(make_ledger):
    def picture(**metrics):
        return draw_overview(make_ledger(metrics=lambda _: metrics))

    assert picture(test_accuracy=0.5, accuracy=0.9, loss=3) == picture(test_accuracy=0.5, accuracy=0.1, loss=1)
    assert picture(accuracy=0.5, loss=3) == picture(accuracy=0.5, loss=1)
    assert picture(accuracy=0.5) != picture(test_accuracy=0.5)


def test_matplotlib_stays_as_the_user_set_it(make_ledger):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    draw_overview(make_ledger())
    assert dict(mpl.rcParams) == before


def test_drawing_needs_no_jax(make_ledger):
    code = (
        "import sys; from fedlens.ledger import Ledger; from fedlens.report import save_overview; "
        f"save_overview(Ledger({str(make_ledger().path)!r})); "
        "print([name for name in ('jax', 'federated_language', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_labels_lie_over_no_line_and_no_other_label():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = np.random.default_rng(0).uniform(0.05, 0.95, (25, 2))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    line = along(np.array([[0.0, 0.0]]), np.array([[1.0, 1.0]]), 200)
    wanted = [Label(f"point {place}", point, "#000000") for place, point in enumerate(points)]
    placed = place_labels(axes, wanted + wanted, np.concatenate([line, points]), count=8)
    assert len(placed) == len({label.name for label in placed}) == len(axes.texts) == 8
    boxes = [text.get_window_extent() for text in axes.texts]
    shown = axes.transData.transform(np.concatenate([line, points]))
    for place, box in enumerate(boxes):
        assert not any(box.contains(*point) for point in shown)
        assert not any(box.overlaps(other) for other in boxes[:place])
        assert axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 <= box.y1 <= axes.bbox.y1


def test_names_are_shortened_and_printable():
    assert shorten("form-03") == "form-03"
    assert shorten("a\nb") == repr("a\nb")
    assert len(shorten("x" * 100)) == 28
