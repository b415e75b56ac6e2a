#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"

// test.repeat: the first byte says how many replies are wanted; each carries its index.
RK_HANDLER {
    uint wanted = rk_in_bytes() > 0u ? rk_in(0u) & 0xffu : 0u;
    if (rk_step() < wanted) {
        if (rk_thread() == 0u) rk_out(0u, rk_step());
        rk_reply_raw(1u);
        if (rk_step() + 1u < wanted) rk_again();
    }
}
