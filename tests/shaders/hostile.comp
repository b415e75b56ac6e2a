#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"

// test.hostile: echoes, then writes what the request's first byte says where no kernel should write it.
RK_HANDLER {
    uint wish = rk_in_bytes() > 0u ? rk_in(0u) & 0xffu : 0u;
    rk_out_copy(rk_in_words());
    rk_reply(rk_in_bytes());
    // The slot behind the reply, and what it must hold to be published.
    uint slot = rk_out_slot, sequence = rk_out_position + 1u;
    if (rk_thread() == 0u && wish >= 1u && wish <= 4u) {
        rk_d2h[slot + RK_HEADER_CORRELATION] = 0u;
        rk_d2h[slot + RK_HEADER_LENGTH_FLAGS] = wish == 2u ? RK_LENGTH_MASK : 0u;
        rk_d2h[slot + RK_HEADER_KIND_LANE] = wish == 3u ? 0xffffu : wish == 4u ? 0xffff0000u : 0u;
    }
    rk_barrier();
    if (rk_thread() == 0u) {
        if (wish == 1u) rk_d2h[slot] = sequence + 7u;
        if (wish >= 2u && wish <= 4u) rk_d2h[slot] = sequence;
        if (wish == 5u) rk_d2h[rk_request_cursor] = rk_position + 0x10000000u;
    }
    if (wish == 6u) rk_position += 0x10000000u;
    if (wish == 7u) {
        rk_out_position += 5u;
        rk_out_slot = rk_replies + rk_slot(rk_out_position);
    }
    if (wish == 8u) {
        rk_out_position += 0x10000000u;
        rk_out_slot = rk_replies + rk_slot(rk_out_position);
    }
}
