#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"

// test.corrupt: writes an `Add` whose bool is neither true nor false.
RK_HANDLER {
    rk_out_copy(6u);
    rk_barrier();
    if (rk_thread() == 0u) rk_out(4u, (rk_in(4u) & 0xffffff00u) | 2u);
    rk_reply_as(1u, 24u);
}
