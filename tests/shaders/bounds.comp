#version 450
#extension GL_GOOGLE_include_directive : require
#define RK_USE_U64
#define RK_USE_F64
#include "ringkernel.glsl"
#include "../kernels/bounds.rk"
