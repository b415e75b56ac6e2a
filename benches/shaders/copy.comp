#version 450
// What a dispatch per message does at least: copies the request's words to the reply.
layout(local_size_x = 16) in;
layout(std430, set = 0, binding = 0) readonly buffer Request { uint request[]; };
layout(std430, set = 0, binding = 1) writeonly buffer Reply { uint reply[]; };
layout(push_constant) uniform Launch { uint words; };

void main() {
    for (uint i = gl_LocalInvocationIndex; i < words; i += gl_WorkGroupSize.x) reply[i] = request[i];
}
