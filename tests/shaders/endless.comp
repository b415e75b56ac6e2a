#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"

// test.endless: loops for ever if the request is not empty; a driver that cuts loops makes it end.
RK_HANDLER {
    uint turns = 0u;
    // A loop without effects might be removed.
    while (rk_in_bytes() != 0u && turns != 0xffffffffu) {
        turns = (turns + 1u) & 0xffffu;
        rk_out(0u, turns);
    }
    rk_reply_raw(0u);
}
