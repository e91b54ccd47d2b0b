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
