#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"

// test.fault: writes two replies, though it declares one, if the request is `panic`; echoes anything else.
RK_HANDLER {
    bool told = rk_in_bytes() == 5u && rk_in(0u) == 0x696e6170u;
    rk_out_copy(rk_in_words());
    rk_reply(rk_in_bytes());
    if (told) rk_reply_raw(0u);
}
