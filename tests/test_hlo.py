"""What is read from a compiled program's text, against texts whose answers are worked out by hand."""

import jax
import jax.numpy as jnp

from jaxnorm import hlo
from jaxnorm.hlo import Collective

HLO = """
  %a.1 = s32[8,128]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %b = (f32[64]{0}, f32[2,3]{1,0}, /*index=2*/f32[]) all-reduce(%p, %q, %r), to_apply=%add
  %c = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%z), dimensions={0}
  %d = bf16[32]{0} all-gather-done(%c)
  %e = pred[5]{0} all-reduce-start(%y), to_apply=%or, metadata={op_name="jit(step)/any"}
  %h = f32[16]{0} reduce-scatter(%w), dimensions={0}
  %f = f64[] add(%g, %h), metadata={op_name="all-reduce("}
"""


def test_collectives_and_what_a_replica_gives_to_each():
    assert hlo.collectives(HLO, 8) == [
        *(Collective("all-gather", 128 * 4), Collective("all-reduce", (64 + 6 + 1) * 4)),
        *(Collective("all-gather", 4 * 2), Collective("all-reduce", 5, "jit(step)/any")),
        Collective("reduce-scatter", 8 * 16 * 4),
    ]


CYCLES = """
%fused.1 (p: f32[2]) -> f32[2] {
  %c = f32[2]{0} convolution(%p, %q), metadata={op_name="jit(f)/conv"}
  ROOT %r = f32[2]{0} reduce(%c), metadata={op_name="jit(f)/batch_statistics/sum"}
}
%fused.2 (p: f32[2]) -> f32[2] {
  ROOT %r = f32[2]{0} reduce(%p), metadata={op_name="jit(f)/batch_statistics/sum"}
}
%rare (p: f32[2]) -> f32[2] {
  ROOT %x = f32[2]{0} fusion(%p), calls=%fused.2, backend_config={"estimated_cycles":"4000"}
}
%usual (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2]{0} parameter(0)
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %a = f32[2]{0} fusion(%p), calls=%fused.1, backend_config={"estimated_cycles":"100"}
  %b = f32[2]{0} fusion(%a), calls=%fused.2, backend_config={"estimated_cycles":"20"}
  %c = f32[2]{0} copy(%b), backend_config={"estimated_cycles":"3"}
  ROOT %d = f32[2]{0} conditional(%i, %c, %c), branch_computations={%usual, %rare}
}
"""


def test_cycles_of_a_step_and_of_a_part_of_it():
    assert hlo.cycles(CYCLES) == 123  # not those of the branch that a step need not take
    assert hlo.cycles(CYCLES, of="batch_statistics") == 120
    assert hlo.cycles(CYCLES, of="batch_statistics", but_with=("convolution",)) == 20


def test_a_branch_that_need_not_be_taken_is_left_out():
    def f(x):
        return jax.lax.cond(x.sum() > 0, lambda x: jnp.sin(x) @ x, lambda x: x, x)

    text = jax.jit(f).lower(jnp.ones((4, 4))).compile().as_text()
    assert "sine(" in text and "sine(" not in hlo.outside_branches(text)


LOOP = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%inner.body (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %x = f32[2]{0} copy(%y), backend_config={"estimated_cycles":"10"}
}
%inner.condition (p: (s32[], f32[2])) -> pred[] {
  ROOT %r = pred[] fusion(%p), calls=%wrapped
}
%body (p: (f32[2], s32[])) -> (f32[2], s32[]) {
  %x = f32[2]{0} all-reduce(%y), to_apply=%add, backend_config={"estimated_cycles":"1"}
  %w = (s32[], f32[2]) while(%z), condition=%inner.condition, body=%inner.body, backend_config={"known_trip_count":{"n":"3"}}
}
%condition (p: (f32[2], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %r = pred[] compare(%counter, %limit), direction=LT, metadata={op_name="lt"}
}
%ENTRY
  %two = s32[]{:T(128)} constant(2)
  %first = s32[]{:T(128)} copy(%two), backend_config={}
  %carried = (f32[2]{0}, /*index=1*/s32[]{:T(128)}) tuple(%x, %first)
  %loop = (f32[2]{0}, s32[]{:T(128)}) while(%carried), condition=%condition, body=%body, metadata={op_name="while"}
  %d = f32[2]{0} copy(%b), backend_config={"estimated_cycles":"100"}
}
""".replace("%ENTRY", "ENTRY %main (p: f32[2]) -> f32[2] {")  # noqa: E501


def test_what_is_in_a_loop_counts_as_often_as_it_goes_round():
    """From 2 to 7, of which each round has three of the loop inside."""
    assert hlo.cycles(LOOP) == 100 + 5 * (1 + 3 * 10)
    assert hlo.collectives(LOOP, 8) == [Collective("all-reduce", 8)] * 5
    assert len(hlo.operations(LOOP)["copy"]) == 2 + 5 * 3
    unknown = LOOP.replace("direction=LT", "direction=NE")
    assert hlo.cycles(unknown) == 100 + 1 + 3 * 10


def test_collectives_of_a_scan_are_those_of_each_of_its_rounds():
    def f(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(jax.lax.psum(c, "i")), None), x, length=6)[0]

    text = jax.pmap(f, axis_name="i").lower(jnp.ones((8, 4))).compile().as_text()
    assert len(hlo.collectives(text, 8)) == 6
