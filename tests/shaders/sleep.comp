#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"

// test.sleep: takes some milliseconds, as many as the first byte says, then echoes.
RK_HANDLER {
    uint millis = rk_in_bytes() > 0u ? rk_in(0u) & 0xffu : 0u;
    if (rk_step() < millis * 2000u) {
        rk_again();
    } else {
        rk_out_copy(rk_in_words());
        rk_reply(rk_in_bytes());
    }
}
