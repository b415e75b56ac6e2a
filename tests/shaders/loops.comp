#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"

// test.loops: loops as often as the request's first word says, and answers with how often it did.
RK_HANDLER {
    uint turns = 0u, wanted = rk_in_words() > 0u ? rk_in(0u) : 0u;
    // A product that a compiler does not see through.
    uint hash = 1u;
    while (turns < wanted) {
        turns++;
        hash = hash * 1664525u + turns;
    }
    if (rk_thread() == 0u) {
        rk_out(0u, turns);
        rk_out(1u, hash);
    }
    rk_reply_raw(8u);
}
