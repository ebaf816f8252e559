"""Which layers the saliency shifts."""

from __future__ import annotations

import pytest

from fedzo.exporter.units import find_units
from tests.exporter.text_graphs import CONVOLUTION, LINEAR, layout_of, parse


def found(text: str) -> list[tuple[str, int, int, bool]]:
    model = parse(text)
    units = find_units(model, layout_of(model))
    return [(u.layer.parameter, u.layer.groups, u.layer.n_moments, u.layer.is_output) for u in units]


def test_convolution_and_transposed_product() -> None:
    assert found(CONVOLUTION) == [("conv_weight", 1, 12, False), ("fc_weight", 1, 3, True)]
    assert found(LINEAR) == [("fc_weight", 1, 3, True)]


def test_offsets_follow_each_other() -> None:
    model = parse(CONVOLUTION)
    first, second = (unit.layer for unit in find_units(model, layout_of(model)))
    assert (first.shift_offset, first.moment_offset) == (0, 0)
    assert (second.shift_offset, second.moment_offset) == (3, 12)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("used twice", "h = Gemm <transB = 1> (x, a) logits = Gemm <transB = 1> (h, a)"),
        ("units on the second axis", "logits = Gemm (x, a)"),
        ("a plain product", "logits = MatMul (x, a)"),
        ("scaled", "logits = Gemm <transB = 1, alpha = 0.5> (x, a)"),
        ("transposed input", "t = Transpose (x) logits = Gemm <transA = 1, transB = 1> (t, a)"),
        ("changed before its use", "b = Relu (a) logits = Gemm <transB = 1> (x, b)"),
    ],
)
def test_other_weights_do_not_count(name: str, body: str) -> None:
    assert found(f"g (float[batch, 4] x, float[4, 4] a) => (float[batch, 4] logits) {{ {body} }}") == [], name


def test_positions_of_unknown_number_do_not_count() -> None:
    assert (
        found("""
    g (float[batch, time, 3] x, float[4, 3] a) => (float[batch, time, 4] logits) {
        t = Transpose <perm = [1, 0]> (a)
        logits = MatMul (x, t)
    }
    """)
        == []
    )
    assert (
        found("""
    g (float[batch, 2, time] x, float[4, 2, 3] a) => (float[batch, 4, after] logits) { logits = Conv (x, a) }
    """)
        == []
    )


@pytest.mark.parametrize(
    ("tail", "is_output"),
    [
        ("logits = Gemm <transB = 1> (x, a, b)", True),
        ("t = Transpose <perm = [1, 0]> (a) h = MatMul (x, t) logits = Add (h, b)", True),
        ("t = Transpose <perm = [1, 0]> (a) h = MatMul (x, t) s = Add (b, h) logits = Identity (s)", True),
        ("h = Gemm <transB = 1> (x, a, b) logits = Relu (h)", False),
        ("h = Gemm <transB = 1> (x, a, b) r = Relu (h) logits = Add (h, r)", False),
        ("h = Gemm <transB = 1> (x, a, b) logits = LogSoftmax (h)", False),
    ],
)
def test_output_layers(tail: str, is_output: bool) -> None:
    text = f"g (float[batch, 3] x, float[4, 3] a, float[4] b) => (float[batch, 4] logits) {{ {tail} }}"
    assert [item[3] for item in found(text)] == [is_output]
