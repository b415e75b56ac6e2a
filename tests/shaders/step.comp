#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"
#include "../kernels/step.rk"
