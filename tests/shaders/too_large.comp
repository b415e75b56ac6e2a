#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"

// test.too_large: answers with more than any of its slots holds.
RK_HANDLER { rk_reply_raw(65536u); }
