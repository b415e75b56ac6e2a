#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"

// test.add: left u64, right u64, negate bool; answers the sum, negated if asked to, as an i128.
RK_HANDLER {
    uint negate = rk_in(4u) & 0xffu;
    if (rk_in_kind() != 1u || rk_in_bytes() < 24u || negate > 1u) {
        rk_error(RK_BAD_REQUEST);
        return;
    }
    uint carry, overflow;
    uint low = uaddCarry(rk_in(0u), rk_in(2u), carry);
    uint high = uaddCarry(rk_in(1u), rk_in(3u), overflow);
    uint more;
    high = uaddCarry(high, carry, more);
    if (overflow + more != 0u) {
        rk_error(7u);
        return;
    }
    uvec4 sum = uvec4(low, high, 0u, 0u);
    if (negate != 0u && (low | high) != 0u) {
        sum = uvec4(~low + 1u, low == 0u ? ~high + 1u : ~high, 0xffffffffu, 0xffffffffu);
    }
    if (rk_thread() < 4u) rk_out(rk_thread(), sum[rk_thread()]);
    rk_reply_as(2u, 16u);
}
