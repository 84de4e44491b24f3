"""The count of bytes, in a program of few lines."""

import pytest
from gpu_bytes import moved_bytes

from dit_jax.planning.hlo import parse

# A loop of 4 runs: a fusion cuts 8 of 32 numbers out and puts them elsewhere, a kernel reads and writes them.
PROGRAM = """
HloModule small

%cut (p.0: f32[4,8], p.1: s32[]) -> f32[8] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %slice = f32[1,8]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%slice)
}

%put (p.2: f32[4,8], p.3: f32[8], p.4: s32[]) -> f32[4,8] {
  %p.2 = f32[4,8]{1,0} parameter(0)
  %p.3 = f32[8]{0} parameter(1)
  %p.4 = s32[] parameter(2)
  %row = f32[1,8]{1,0} bitcast(%p.3)
  ROOT %update = f32[4,8]{1,0} dynamic-update-slice(%p.2, %row, %p.4, %p.4)
}

%body (state: (s32[], f32[4,8], f32[4,8])) -> (s32[], f32[4,8], f32[4,8]) {
  %state = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %from = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %to = f32[4,8]{1,0} get-tuple-element(%state), index=2
  %one = f32[8]{0} fusion(%from, %i), kind=kLoop, calls=%cut
  %two = f32[8]{0} custom-call(%one), custom_call_target="kernel"
  %all = f32[4,8]{1,0} fusion(%to, %two, %i), kind=kLoop, calls=%put
  ROOT %next = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}) tuple(%i, %from, %all)
}

%condition (state.1: (s32[], f32[4,8], f32[4,8])) -> pred[] {
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: f32[4,8], y: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[4,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}) tuple(%zero, %x, %y)
  %loop = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}) while(%start), condition=%condition, body=%body, TRIPS
  %last = f32[4,8]{1,0} get-tuple-element(%loop), index=2
  ROOT %sum = f32[4,8]{1,0} add(%last, %x)
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"4"}}')


def test_bytes_are_those_of_the_slices_that_a_loop_touches():
    index, row, stack = 4, 32, 128
    cut, kernel, put = row + index + row, row + row, row + index + row
    assert moved_bytes(parse(PROGRAM)) == 4 * (cut + kernel + put) + 3 * stack


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="does not say how often loop runs"):
        moved_bytes(parse(PROGRAM.replace("known_trip_count", "other")))
