// The device half of a persistent kernel, in GLSL: the layouts, the accessors that a handler is written against, and the
// polling loop. A kernel is this file and a handler behind it:
//
//     #version 450
//     #extension GL_GOOGLE_include_directive : require
//     #include "ringkernel.glsl"
//     RK_HANDLER { RK_FOR(i, rk_in_words()) { rk_out(i, rk_in(i)); } rk_reply(rk_in_bytes()); }
//
//     glslangValidator -V --target-env vulkan1.1 -Ishaders -o mine.spv mine.comp
//
// A dispatch of it is one *slice*: it polls until its budget is spent and leaves everything that the next slice needs
// in memory. One workgroup is one block of the grid. All invocations of a block run the handler together, so that every
// function marked [all] must be called by all of them alike.
//
// Built with -DRK_TRACES as well, it is the module for kernels whose messages are traced. That one reads the device's clock, and only
// devices whose shaders have one take it; without, there is nothing of it in the module.

#extension GL_KHR_shader_subgroup_shuffle : require
#ifdef RK_TRACES
#extension GL_EXT_shader_realtime_clock : require
#endif
// Handlers that need 64-bit values define these before this file is included; only devices that have them take such a module.
#ifdef RK_USE_U64
#extension GL_ARB_gpu_shader_int64 : require
#define rk_u64 uint64_t
#define RK_HAS_U64
#endif
#ifdef RK_USE_F64
#define RK_HAS_F64
#endif
#ifdef RK_USE_TIME
#error "Vulkan shaders have no clock that counts nanoseconds"
#endif

// Layouts. Sizes and offsets are in words of 4 bytes; a test compares each with the Rust structures of the same name.
const uint RK_HEADER_WORDS = 4u;
const uint RK_EXTENSION_WORDS = 8u;
const uint RK_CURSOR_WORDS = 32u;
const uint RK_HEADER_SEQUENCE = 0u;
const uint RK_HEADER_CORRELATION = 1u;
const uint RK_HEADER_LENGTH_FLAGS = 2u;
const uint RK_HEADER_KIND_LANE = 3u;
const uint RK_LENGTH_MASK = 0x00ffffffu;
const uint RK_PRIORITY_MASK = 0x03000000u;
const uint RK_ERROR_BIT = 0x04000000u;
const uint RK_EXTENDED_BIT = 0x08000000u;
// The host's line of the control block, behind the request slots and the reply ring's cursor.
const uint RK_HOST_ACTIVE = 0u;
const uint RK_HOST_TERMINATE = 1u;
const uint RK_HOST_SLICE_BUDGET = 2u;
const uint RK_HOST_EPOCH = 3u;
const uint RK_HOST_IDLE_BUDGET = 4u;
const uint RK_HOST_WORDS = 16u;
// Behind it the link, by which a kernel that writes into this one's request slots learns how far this one has read, and the
// kinds of the kernel that replies are passed on to, by kinds of this one, two in a word.
const uint RK_LINK_WORDS = 16u;
// A block's share of the state begins at a multiple of this.
const uint RK_STATE_UNIT = 16u;
const uint RK_NO_KIND = 0xffffu;
// The device's lines, behind the reply slots and the request ring's cursor.
const uint RK_DEVICE_PROCESSED = 0u;
const uint RK_DEVICE_PRODUCED = 1u;
const uint RK_DEVICE_STEP = 2u;
const uint RK_DEVICE_PASSED = 3u;
const uint RK_DEVICE_STATE = 16u;
const uint RK_DEVICE_HEARTBEAT = 17u;
const uint RK_DEVICE_DROPPED = 18u;
const uint RK_DEVICE_LAST_ERROR = 19u;
const uint RK_DEVICE_SLICE_NUMBER = 20u;
const uint RK_DEVICE_HAS_TERMINATED = 21u;
const uint RK_DEVICE_FAULT = 22u;
const uint RK_DEVICE_WORDS = 48u;
// Telemetry, behind the device's lines. 64-bit counters, low word first.
const uint RK_TELEMETRY_VERSION = 0u;
const uint RK_TELEMETRY_RECEIVED = 2u;
const uint RK_TELEMETRY_REPLIED = 4u;
const uint RK_TELEMETRY_ERRORS = 6u;
const uint RK_TELEMETRY_BYTES_IN = 8u;
const uint RK_TELEMETRY_BYTES_OUT = 10u;
#ifdef RK_TRACES
// In which half of its low word's range the clock last was.
const uint RK_HOST_CLOCK_HALF = 15u;
// Traces, behind the telemetry: a line of the block's own, then samples.
const uint RK_TELEMETRY_WORDS = 32u;
const uint RK_TRACE_SLOTS = 256u;
const uint RK_TRACE_WORDS = 16u;
const uint RK_TRACE_WRITTEN = 0u;
const uint RK_TRACE_HEADER_SEEN = 4u;
const uint RK_TRACE_VERSION = 0u;
const uint RK_TRACE_NUMBER = 1u;
const uint RK_TRACE_CORRELATION = 2u;
const uint RK_TRACE_SENT = 4u;
const uint RK_TRACE_SEEN = 6u;
const uint RK_TRACE_DONE = 8u;
const uint RK_TRACE_TRACE_ID = 12u;
#endif
// Values of the `state` word.
const uint RK_STATE_IDLE = 1u;
const uint RK_STATE_POLLING = 2u;
const uint RK_STATE_ENDED = 3u;
const uint RK_STATE_FAULTED = 4u;
// Values of the `fault` word.
const uint RK_FAULT_NONE = 0u;
const uint RK_FAULT_CORRUPT_RING = 1u;
const uint RK_FAULT_LOOP_CUT = 2u;
const uint RK_FAULT_TOO_MANY_REPLIES = 3u;
// Codes of error replies, as in `HandlerError`.
const uint RK_BAD_REQUEST = 0xffffffffu;
const uint RK_REPLY_TOO_LARGE = 0xfffffffeu;
// Most kinds beside raw bytes.
const uint RK_MAX_KINDS = 64u;
// Most threads of a block, and words that they share.
const uint RK_MAX_THREADS = 1024u;
const uint RK_SHARED_WORDS = 1024u;

// Declares to the host which layout this module was built for: the default of specialization constant 31.
layout(constant_id = 31) const uint RK_LAYOUT_VERSION = 3u;

layout(local_size_x_id = 0) in;

// Set by the host where the whole block is one SIMD group of a software driver, and so one thread of the host's CPU. Barriers
// mean nothing there, not even to that driver's compiler, which then reads a slot once and for all; but it keeps loads and
// stores on their side of an atomic operation. Only for memory that is the host's own: over a bus there are loads and
// stores alone.
layout(constant_id = 1) const bool RK_LOCKSTEP = false;

// Of the first only the link is written, and the requests read atomically.
layout(std430, set = 0, binding = 0) volatile buffer RkHostToDevice { uint rk_h2d[]; };
layout(std430, set = 0, binding = 1) volatile buffer RkDeviceToHost { uint rk_d2h[]; };
// The same memory four words at a time: one access for 16 bytes.
layout(std430, set = 0, binding = 0) volatile buffer RkHostToDevice4 { uvec4 rk_h2d4[]; };
#ifdef RK_TRACES
layout(std430, set = 0, binding = 1) volatile buffer RkDeviceToHost4 { uvec4 rk_d2h4[]; };
#endif
layout(std430, set = 0, binding = 2) coherent buffer RkState { uint rk_state_words[]; };
// Where replies go: the second, or the first of another kernel.
layout(std430, set = 0, binding = 3) volatile buffer RkReplies { uint rk_out_words_of[]; };
layout(std430, set = 0, binding = 3) volatile buffer RkReplies4 { uvec4 rk_out_words4_of[]; };

layout(push_constant) uniform RkLaunch {
    uint host_to_device_words;  // From one block to the next, in words.
    uint device_to_host_words;
    uint state_words;           // Of one block.
    uint capacity;              // Slots of a ring.
    uint slot_words;
    uint epoch;                 // Of the command buffer; a slice of another epoch than the host's ends at once.
    uint message_cost;          // Loop iterations to charge for one run of the handler.
    uint replies;               // Replies that one run of the handler may write.
    uint kinds;                 // Kinds that the kernel takes, beside raw bytes.
    uint telemetry;             // Whether counters are kept.
    uint next_capacity;         // Slots of the ring of the kernel that replies are passed on to; 0 if they go into the own one.
    uint next_slot_words;
    uint next_offset;           // From the count of replies passed on to the position in that ring.
    uint two;                   // 2; a compiler must not know that.
#ifdef RK_TRACES
    uint trace_every;           // One request in so many is traced; 0 if none is.
#endif
} rk_launch;

// Whether loops were cut in any SIMD group, which may be another than that of the invocation that publishes.
shared uint rk_cut;
// What one invocation read, for all others. Two halves in turn, so that one barrier a poll is enough.
shared uint rk_seen[2];
shared uvec4 rk_news;

// Holds the block together, and shows each invocation what the others wrote to buffers. `barrier()` alone orders shared
// memory, and costs a third of it. In lockstep neither is needed.
#define RK_SYNC { if (!RK_LOCKSTEP) { memoryBarrierBuffer(); barrier(); } }

const uint RK_RUN = 1u;
const uint RK_TERMINATE = 2u;
const uint RK_STALE = 4u;

// Software drivers go through the lanes of a vector one by one for each access that is not masked off: what all
// invocations need alike, one lane of each subgroup reads for the others. A shuffle with a constant index is one instruction
// of a CPU; a broadcast is a loop over the lanes (Mesa 22.3).
bool rk_reads;
uint rk_read_h2d(uint at) {
    uint value = 0u;
    if (rk_reads) value = rk_h2d[at];
    return subgroupShuffle(value, 0u);
}
uint rk_read_d2h(uint at) {
    uint value = 0u;
    if (rk_reads) value = rk_d2h[at];
    return subgroupShuffle(value, 0u);
}

// Where this block's pieces start, in words.
uint rk_requests, rk_reply_cursor, rk_host_line, rk_link, rk_replies, rk_request_cursor, rk_device_line, rk_telemetry_line,
    rk_state_base;
// The ring that replies go into, and how many replies are produced beyond the position in it.
uint rk_out_capacity, rk_out_slot_words, rk_out_beyond;
// A kind of this kernel's, and the next one's for it.
uint rk_known_kind, rk_known_next;
// Positions of the rings, and how many replies the present run may still write.
uint rk_position, rk_out_position, rk_left;
// The slots that these fall on.
uint rk_in_slot, rk_out_slot;
// The request in hand.
uint rk_correlation, rk_length_flags, rk_kind_lane, rk_request, rk_bytes, rk_step_number;
// The reply in the making: its payload, and the most bytes that fit.
uint rk_reply_payload, rk_reply_limit;
// What the handler asked for.
bool rk_wants_again;
uint rk_error_code, rk_fault_code;
bool rk_has_error;
// Counters; all invocations count alike, the first one stores.
uvec2 rk_received, rk_replied, rk_errors, rk_bytes_in, rk_bytes_out;
#ifdef RK_TRACES
// What the clock showed when the request in hand was taken up, and when it was done with; low words first.
uvec2 rk_seen_at, rk_done_at;
uint rk_clock_half;
// Whether the request in hand carries a trace id, and whether the last one that is done with is to be sampled.
bool rk_has_trace_id, rk_sampled;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// What a handler is written against.

// Opens the handler: `RK_HANDLER { ... }`.
#define RK_HANDLER void rk_handler()
void rk_handler();

// This invocation's index in its block, and their number.
uint rk_thread() { return gl_LocalInvocationIndex; }
uint rk_threads() { return gl_WorkGroupSize.x; }
// This block's index in the grid, and their number.
uint rk_block() { return gl_WorkGroupID.x; }
uint rk_blocks() { return gl_NumWorkGroups.x; }
// A loop over 0..n, shared by the threads of the block.
#define RK_FOR(i, n) for (uint i = rk_thread(); i < (n); i += rk_threads())
// Waits for all threads of the block, and shows each what the others wrote to state. [all]
#define rk_barrier() RK_SYNC

// Every index is allowed, in every accessor below. A read beyond the end gives 0, and a write
// beyond it does nothing. A 64-bit value is beyond the end if either of its words is.

// The request's payload: its bytes, its words (the last one may be cut short), its kind (0 is raw bytes).
uint rk_in_bytes() { return rk_bytes; }
uint rk_in_words() { return (rk_bytes + 3u) >> 2; }
uint rk_in_kind() { return rk_kind_lane & 0xffffu; }
uint rk_in(uint i) {
    uint value = 0u;
    if (i < rk_in_words()) value = rk_h2d[rk_request + i];
    return value;
}
int rk_in_i32(uint i) { return int(rk_in(i)); }
float rk_in_f32(uint i) { return uintBitsToFloat(rk_in(i)); }
// Words that a reply can hold.
uint rk_out_words() { return rk_reply_limit >> 2; }
// Writes a word of the reply, whose end is that of its slot.
void rk_out(uint i, uint value) {
    if (i < (rk_reply_limit >> 2) && rk_left != 0u) rk_out_words_of[rk_reply_payload + i] = value;
}
void rk_out_i32(uint i, int value) { rk_out(i, uint(value)); }
void rk_out_f32(uint i, float value) { rk_out(i, floatBitsToUint(value)); }
// 64-bit values in two words, low word first.
#if defined(RK_USE_U64) || defined(RK_USE_F64)
uvec2 rk_in_pair(uint i) {
    uvec2 words = uvec2(0u);
    // The largest index has none behind it.
    if (i < rk_in_words() && i + 1u < rk_in_words()) words = uvec2(rk_h2d[rk_request + i], rk_h2d[rk_request + i + 1u]);
    return words;
}
void rk_out_pair(uint i, uvec2 words) {
    if (i < rk_out_words() && i + 1u < rk_out_words()) {
        rk_out(i, words.x);
        rk_out(i + 1u, words.y);
    }
}
#endif
#ifdef RK_USE_U64
rk_u64 rk_in_u64(uint i) { return packUint2x32(rk_in_pair(i)); }
void rk_out_u64(uint i, rk_u64 value) { rk_out_pair(i, unpackUint2x32(value)); }
#endif
#ifdef RK_USE_F64
double rk_in_f64(uint i) { return packDouble2x32(rk_in_pair(i)); }
void rk_out_f64(uint i, double value) { rk_out_pair(i, unpackDouble2x32(value)); }
#endif
// Copies `n` words of the request, from the first on, to the reply, shared by the threads of the
// block: as many as the request has and the reply holds. What it leaves in the up to three words
// behind them, to the next multiple of four, is not defined.
void rk_out_copy(uint n) {
    uint i = rk_thread(), end = (min(min(n, rk_in_words()), rk_reply_limit >> 2) + 3u) >> 2;
    if (i < end && rk_left != 0u) {
        do {
            rk_out_words4_of[(rk_reply_payload >> 2) + i] = rk_h2d4[(rk_request >> 2) + i];
            i += rk_threads();
        } while (i < end);
    }
}

// Rounded after each operation, as on the CPU; a plain expression may be fused.
float rk_mul_f32(float a, float b) {
    precise float product = a * b;
    return product;
}
float rk_add_f32(float a, float b) {
    precise float sum = a + b;
    return sum;
}

// The block's state words, zero at launch.
uint rk_state(uint i) {
    uint value = 0u;
    if (i < rk_launch.state_words) value = rk_state_words[rk_state_base + i];
    return value;
}
void rk_set_state(uint i, uint value) {
    if (i < rk_launch.state_words) rk_state_words[rk_state_base + i] = value;
}

// Words that the block's threads share during one run of the handler.
shared uint rk_shared_words[RK_SHARED_WORDS];
uint rk_shared(uint i) {
    uint value = 0u;
    if (i < RK_SHARED_WORDS) value = rk_shared_words[i];
    return value;
}
void rk_set_shared(uint i, uint value) {
    if (i < RK_SHARED_WORDS) rk_shared_words[i] = value;
}

// Over the values of all threads, the same for each: sum, least, greatest. Floats are added in the order of a tree over the
// threads' indices. A reduction takes as many loop iterations as the block's size has bits. [all]
shared uint rk_scratch[RK_MAX_THREADS];
#define RK_REDUCTION(name, type, to, from, combine) \
type name(type value) { \
    rk_scratch[rk_thread()] = to(value); \
    RK_SYNC \
    uint span = rk_threads() > 1u ? 1u << findMSB(rk_threads() - 1u) : 0u; \
    while (span > 0u) { \
        if (rk_thread() < span && rk_thread() + span < rk_threads()) { \
            type a = from(rk_scratch[rk_thread()]); \
            type b = from(rk_scratch[rk_thread() + span]); \
            rk_scratch[rk_thread()] = to(combine); \
        } \
        RK_SYNC \
        span >>= 1; \
    } \
    type result = from(rk_scratch[0]); \
    RK_SYNC \
    return result; \
}
RK_REDUCTION(rk_sum_u32, uint, uint, uint, a + b)
RK_REDUCTION(rk_min_u32, uint, uint, uint, min(a, b))
RK_REDUCTION(rk_max_u32, uint, uint, uint, max(a, b))
RK_REDUCTION(rk_sum_f32, float, floatBitsToUint, uintBitsToFloat, rk_add_f32(a, b))
RK_REDUCTION(rk_min_f32, float, floatBitsToUint, uintBitsToFloat, b < a ? b : a)
RK_REDUCTION(rk_max_f32, float, floatBitsToUint, uintBitsToFloat, b > a ? b : a)

// How often the handler has been run for this request already; above 0 only after `rk_again`.
uint rk_step() { return rk_step_number; }
// Asks that the handler be run for the same request again, when there is room for its replies. [all]
void rk_again() { rk_wants_again = true; }
// Fails the request: an error reply with this code follows when the handler returns. [all]
void rk_error(uint code) {
    rk_has_error = true;
    rk_error_code = code;
}

void rk_add(inout uvec2 counter, uint value) {
    uint before = counter.x;
    counter.x = before + value;
    if (counter.x < before) counter.y++;
}

uint rk_slot(uint position) { return (position & (rk_launch.capacity - 1u)) * rk_launch.slot_words; }
uint rk_slot_out(uint position) { return rk_replies + (position & (rk_out_capacity - 1u)) * rk_out_slot_words; }

// Whether replies are passed on to another kernel.
bool rk_passes() { return rk_launch.next_capacity != 0u; }

void rk_aim_reply() {
    bool extended = (rk_length_flags & RK_EXTENDED_BIT) != 0u;
    uint skip = extended ? RK_HEADER_WORDS + RK_EXTENSION_WORDS : RK_HEADER_WORDS;
    rk_reply_payload = rk_out_slot + skip;
    rk_reply_limit = 4u * (rk_out_slot_words - skip);
}

// Learns what the next kernel knows a kind by.
void rk_look_kind_up(uint kind) {
    rk_known_kind = kind;
    rk_known_next = RK_NO_KIND;
    uint index = kind - 1u;
    if (kind == 0u) {
        rk_known_next = 0u;
    } else if (index < RK_MAX_KINDS) {
        uint pair = rk_read_h2d(rk_link + RK_LINK_WORDS + (index >> 1));
        rk_known_next = (index & 1u) == 0u ? pair & 0xffffu : pair >> 16;
    }
}

// A driver that cuts loops short does so without a word; this loop is then cut as well.
void rk_check_cut() {
    uint turns = 0u;
    for (uint i = 0u; i < rk_launch.two; i++) turns++;
    if (turns != 2u) rk_fault_code = RK_FAULT_LOOP_CUT;
}

// Makes a fault that any invocation has found known to all of them. [all]
#define rk_agree() { \
    if (!RK_LOCKSTEP && rk_fault_code != RK_FAULT_NONE) rk_cut = rk_fault_code; \
    RK_SYNC \
    if (!RK_LOCKSTEP) rk_fault_code = rk_cut; \
}

// Publishes what `rk_out` wrote.
void rk_publish(uint kind, uint flags, uint bytes) {
    rk_check_cut();
    if (rk_passes()) {
        if (kind != rk_known_kind) rk_look_kind_up(kind);
        kind = rk_known_next;
    }
    if (rk_passes() && kind == RK_NO_KIND) {
        rk_error(RK_BAD_REQUEST);
    } else if (bytes > rk_reply_limit) {
        rk_error(RK_REPLY_TOO_LARGE);
    } else if (rk_left == 0u) {
        if (rk_fault_code == RK_FAULT_NONE) rk_fault_code = RK_FAULT_TOO_MANY_REPLIES;
    } else {
        // A word an invocation, in one access.
        uint word = bytes | flags | (rk_length_flags & (RK_PRIORITY_MASK | RK_EXTENDED_BIT));
        if (rk_thread() == RK_HEADER_CORRELATION) word = rk_correlation;
        if (rk_thread() == RK_HEADER_KIND_LANE) word = (rk_kind_lane & 0xffff0000u) | kind;
        if (rk_thread() - 1u < RK_HEADER_WORDS - 1u) rk_out_words_of[rk_out_slot + rk_thread()] = word;
        // All of the reply is in memory before its sequence is.
        rk_agree()
        // What was written is not what the handler means if its loops were cut.
        bool whole = rk_fault_code == RK_FAULT_NONE;
        rk_out_position += whole ? 1u : 0u;
        rk_left = whole ? rk_left - 1u : 0u;
        if (rk_thread() == 0u && whole) {
            if (RK_LOCKSTEP) {
                atomicExchange(rk_out_words_of[rk_out_slot], rk_out_position);
            } else {
                rk_out_words_of[rk_out_slot] = rk_out_position;
            }
        }
        rk_out_slot = rk_slot_out(rk_out_position);
        rk_add(rk_replied, whole ? 1u : 0u);
        rk_add(rk_bytes_out, whole ? bytes : 0u);
        rk_aim_reply();
    }
}

// Sends the reply: `bytes` of what `rk_out` wrote, of this kind, or of the request's. One more than
// the kernel declared for each run fails the kernel. A kind that does not fit its half of a word is
// one that no kernel knows. [all]
void rk_reply_as(uint kind, uint bytes) { rk_publish(min(kind, RK_NO_KIND), 0u, bytes); }
void rk_reply(uint bytes) { rk_publish(rk_in_kind(), 0u, bytes); }
// The same as raw bytes, whatever the request was. [all]
void rk_reply_raw(uint bytes) { rk_publish(0u, 0u, bytes); }

// ---------------------------------------------------------------------------------------------------------------------
// The loop.

#ifdef RK_TRACES
// The device's clock. One that shows its low word alone is completed by what the host says: in which half of the range it was, half a
// range ago at most.
uvec2 rk_clock() {
    uvec2 now = clockRealtime2x32EXT();
    if (rk_clock_half != 0u) now.y = (rk_clock_half + ((rk_clock_half ^ (now.x >> 31)) & 1u)) >> 1;
    return now;
}

uint rk_trace_header() { return rk_telemetry_line + RK_TELEMETRY_WORDS; }

void rk_begin_traces() {
    rk_seen_at = uvec2(0u);
    rk_clock_half = 0u;
    rk_has_trace_id = false;
    rk_sampled = false;
    if (rk_launch.trace_every != 0u) {
        rk_clock_half = rk_read_h2d(rk_host_line + RK_HOST_CLOCK_HALF);
        // A request that takes several slices was taken up once.
        uint at = rk_trace_header() + RK_TRACE_HEADER_SEEN;
        rk_seen_at.x = rk_read_d2h(at);
        rk_seen_at.y = rk_read_d2h(at + 1u);
    }
}

// Decides whether the request in hand, which is done with, is to be sampled.
void rk_sample() {
    bool has_id = rk_has_trace_id && (rk_length_flags & RK_EXTENDED_BIT) != 0u;
    rk_sampled = rk_launch.trace_every != 0u && (has_id || rk_position % rk_launch.trace_every == 0u);
    rk_done_at = rk_clock();
}

// A store by the first invocation that keeps its place among all others. [all]
void rk_store_in_order(uint at, uint value) {
    if (RK_LOCKSTEP) {
        if (rk_thread() == 0u) atomicExchange(rk_d2h[at], value);
    } else {
        RK_SYNC
        if (rk_thread() == 0u) rk_d2h[at] = value;
        RK_SYNC
    }
}

// Writes the sample of the request before the present position over the oldest one. [all]
void rk_trace() {
    uint number = rk_read_d2h(rk_trace_header() + RK_TRACE_WRITTEN);
    uint slot = rk_trace_header() + RK_TRACE_WORDS * (1u + (number & (RK_TRACE_SLOTS - 1u)));
    uint version = rk_read_d2h(slot + RK_TRACE_VERSION);
    // A seqlock, as for the counters.
    rk_store_in_order(slot + RK_TRACE_VERSION, version + 1u);
    if (rk_thread() == 0u) {
        uvec4 stamps = uvec4(0u), id = uvec4(0u);
        if ((rk_length_flags & RK_EXTENDED_BIT) != 0u) {
            uint extension = (rk_requests + rk_slot(rk_position - 1u) + RK_HEADER_WORDS) >> 2;
            stamps = rk_h2d4[extension];
            id = rk_h2d4[extension + 1u];
        }
        rk_d2h[slot + RK_TRACE_NUMBER] = number;
        rk_d2h[slot + RK_TRACE_CORRELATION] = rk_correlation;
        rk_d2h[slot + RK_TRACE_SENT] = stamps.x;
        rk_d2h[slot + RK_TRACE_SENT + 1u] = stamps.y;
        rk_d2h[slot + RK_TRACE_SEEN] = rk_seen_at.x;
        rk_d2h[slot + RK_TRACE_SEEN + 1u] = rk_seen_at.y;
        rk_d2h[slot + RK_TRACE_DONE] = rk_done_at.x;
        rk_d2h[slot + RK_TRACE_DONE + 1u] = rk_done_at.y;
        rk_d2h[slot + RK_TRACE_TRACE_ID] = id.x;
        rk_d2h[slot + RK_TRACE_TRACE_ID + 1u] = id.y;
        rk_d2h[slot + RK_TRACE_TRACE_ID + 2u] = id.z;
        rk_d2h[slot + RK_TRACE_TRACE_ID + 3u] = id.w;
    }
    rk_store_in_order(slot + RK_TRACE_VERSION, version + 2u);
    if (rk_thread() == 0u) rk_d2h[rk_trace_header() + RK_TRACE_WRITTEN] = number + 1u;
}
#endif

void rk_begin() {
    uint slots = rk_launch.capacity * rk_launch.slot_words;
    rk_requests = rk_block() * rk_launch.host_to_device_words;
    rk_reply_cursor = rk_requests + slots;
    rk_host_line = rk_reply_cursor + RK_CURSOR_WORDS;
    rk_link = rk_host_line + RK_HOST_WORDS;
    rk_replies = rk_block() * rk_launch.device_to_host_words;
    rk_request_cursor = rk_replies + slots;
    rk_device_line = rk_request_cursor + RK_CURSOR_WORDS;
    rk_telemetry_line = rk_device_line + RK_DEVICE_WORDS;
    rk_state_base = rk_block() * ((rk_launch.state_words + RK_STATE_UNIT - 1u) & ~(RK_STATE_UNIT - 1u));
    rk_reads = gl_SubgroupInvocationID == 0u;
    rk_position = rk_read_d2h(rk_device_line + RK_DEVICE_PROCESSED);
    uint produced = rk_read_d2h(rk_device_line + RK_DEVICE_PRODUCED);
    uint passed = rk_read_d2h(rk_device_line + RK_DEVICE_PASSED);
    rk_step_number = rk_read_d2h(rk_device_line + RK_DEVICE_STEP);
    rk_out_capacity = rk_launch.capacity;
    rk_out_slot_words = rk_launch.slot_words;
    rk_out_position = produced - passed;
    if (rk_passes()) {
        // Only kernels of one block are connected so.
        rk_replies = 0u;
        rk_out_capacity = rk_launch.next_capacity;
        rk_out_slot_words = rk_launch.next_slot_words;
        rk_out_position = passed + rk_launch.next_offset;
        rk_reply_cursor = rk_out_capacity * rk_out_slot_words + RK_CURSOR_WORDS + RK_HOST_WORDS;
    }
    rk_out_beyond = produced - rk_out_position;
    rk_known_kind = 0u;
    rk_known_next = 0u;
    rk_in_slot = rk_requests + rk_slot(rk_position);
    rk_out_slot = rk_slot_out(rk_out_position);
    rk_fault_code = RK_FAULT_NONE;
    rk_left = 0u;
#ifdef RK_TRACES
    rk_begin_traces();
#endif
}

uvec2 rk_load_counter(uint word) {
    uint at = rk_telemetry_line + word;
    return uvec2(rk_d2h[at], rk_d2h[at + 1u]);
}

void rk_store_counter(uint word, uvec2 value) {
    uint at = rk_telemetry_line + word;
    rk_d2h[at] = value.x;
    rk_d2h[at + 1u] = value.y;
}

void rk_load_telemetry() {
    rk_received = rk_load_counter(RK_TELEMETRY_RECEIVED);
    rk_replied = rk_load_counter(RK_TELEMETRY_REPLIED);
    rk_errors = rk_load_counter(RK_TELEMETRY_ERRORS);
    rk_bytes_in = rk_load_counter(RK_TELEMETRY_BYTES_IN);
    rk_bytes_out = rk_load_counter(RK_TELEMETRY_BYTES_OUT);
}

// A seqlock: the version is odd while the counters change.
void rk_store_telemetry() {
    if (rk_launch.telemetry == 0u) return;
    uint version = rk_d2h[rk_telemetry_line + RK_TELEMETRY_VERSION];
    rk_d2h[rk_telemetry_line + RK_TELEMETRY_VERSION] = version + 1u;
    memoryBarrierBuffer();
    rk_store_counter(RK_TELEMETRY_RECEIVED, rk_received);
    rk_store_counter(RK_TELEMETRY_REPLIED, rk_replied);
    rk_store_counter(RK_TELEMETRY_ERRORS, rk_errors);
    rk_store_counter(RK_TELEMETRY_BYTES_IN, rk_bytes_in);
    rk_store_counter(RK_TELEMETRY_BYTES_OUT, rk_bytes_out);
    memoryBarrierBuffer();
    rk_d2h[rk_telemetry_line + RK_TELEMETRY_VERSION] = version + 2u;
}

// What the host wants of this slice. For invocation 0.
uint rk_commands() {
    if (rk_h2d[rk_host_line + RK_HOST_EPOCH] != rk_launch.epoch) return RK_STALE;
    if (rk_h2d[rk_host_line + RK_HOST_TERMINATE] != 0u) return RK_TERMINATE;
    return rk_h2d[rk_host_line + RK_HOST_ACTIVE] != 0u ? RK_RUN : 0u;
}

// Takes up the request at the present position.
void rk_take() {
    // A word a lane, in one access.
    uint word = 0u;
    if (gl_SubgroupInvocationID < RK_HEADER_WORDS) word = rk_h2d[rk_in_slot + gl_SubgroupInvocationID];
    rk_correlation = subgroupShuffle(word, RK_HEADER_CORRELATION);
    rk_length_flags = subgroupShuffle(word, RK_HEADER_LENGTH_FLAGS);
    rk_kind_lane = subgroupShuffle(word, RK_HEADER_KIND_LANE);
    rk_bytes = rk_length_flags & RK_LENGTH_MASK;
    rk_request = rk_in_slot + RK_HEADER_WORDS;
    if ((rk_length_flags & RK_EXTENDED_BIT) != 0u) rk_request += RK_EXTENSION_WORDS;
    rk_aim_reply();
}

// Goes on to the next request, or to the next run for the same one.
void rk_advance() {
    if (rk_wants_again) {
        rk_step_number++;
    } else {
#ifdef RK_TRACES
        rk_sample();
#endif
        rk_step_number = 0u;
        rk_position++;
        rk_in_slot = rk_requests + rk_slot(rk_position);
        rk_add(rk_received, 1u);
        rk_add(rk_bytes_in, rk_bytes);
    }
}

// Makes known how far the block has got. For invocation 0.
void rk_show_progress() {
    rk_d2h[rk_device_line + RK_DEVICE_PRODUCED] = rk_out_position + rk_out_beyond;
    rk_d2h[rk_device_line + RK_DEVICE_STEP] = rk_step_number;
#ifdef RK_TRACES
    if (rk_launch.trace_every != 0u) {
        uint at = rk_trace_header() + RK_TRACE_HEADER_SEEN;
        rk_d2h[at] = rk_seen_at.x;
        rk_d2h[at + 1u] = rk_seen_at.y;
    }
#endif
    if (rk_passes()) {
        rk_d2h[rk_device_line + RK_DEVICE_PASSED] = rk_out_position - rk_launch.next_offset;
        // Whoever knows that a request is done with knows what came of it.
        memoryBarrierBuffer();
    }
    rk_d2h[rk_device_line + RK_DEVICE_PROCESSED] = rk_position;
}

// Why the loop over messages was left.
const uint RK_LEFT_IDLE = 0u;      // No request.
const uint RK_LEFT_BUSY = 1u;      // Its turn was over.
const uint RK_LEFT_NO_ROOM = 2u;   // No room for the replies.
const uint RK_LEFT_EXTENDED = 3u;  // The request's extension is not in the replies' slots yet.
const uint RK_LEFT_ERROR = 4u;     // An error reply must be written.
const uint RK_LEFT_FAULT = 5u;     // The block cannot go on.
const uint RK_LEFT_PASS_ON = 6u;   // The request is an error of a handler before this one, which no other handler sees.

// Polls between two looks at the host's commands, and messages in between: fewer than one in a hundred waits for a look.
// Handlers that loop for long make looks more frequent.
const uint RK_POLLS = 64u;
const uint RK_MESSAGES = 128u;
const uint RK_ITERATIONS = 8192u;
// Looks between two signs of life.
const uint RK_LOOKS_PER_BEAT = 8u;

// Loop iterations to charge for one turn of the two outer loops, beside those that are counted: a software driver also
// goes through each inner loop, and those of the handler, once when it leaves the loop around it.
const uint RK_LOOK_COST = 26u;
const uint RK_HOUSEKEEPING_COST = 16u;

// Loops are nested by how often their bodies are needed: a software driver runs the memory accesses of every branch, taken
// or not, so that whatever is rare must lie outside of what is frequent. A message pays for the two innermost loops only.
void main() {
    rk_begin();
    bool leader = rk_thread() == 0u;
    uint budget = rk_h2d[rk_host_line + RK_HOST_SLICE_BUDGET];
    uint idle_budget = rk_h2d[rk_host_line + RK_HOST_IDLE_BUDGET];
    uint give_back = max(rk_launch.capacity >> 2, 1u);
    uint capacity = rk_launch.capacity;
    // An error reply needs a slot as well.
    uint needed = max(rk_launch.replies, 1u);
    if (leader) {
        uint state = rk_d2h[rk_device_line + RK_DEVICE_STATE];
        uint wanted = state == RK_STATE_FAULTED || state == RK_STATE_ENDED ? RK_STALE : rk_commands();
        rk_news = uvec4(wanted, budget, idle_budget, 0u);
        rk_cut = RK_FAULT_NONE;
    }
    RK_SYNC
    // All invocations go by what one of them read.
    uint flags = rk_news.x;
    budget = rk_news.y;
    idle_budget = rk_news.z;
    if (flags != RK_RUN) {
        // Nothing is begun: only a command may have to be answered.
        if (leader && flags == RK_TERMINATE) {
            rk_d2h[rk_device_line + RK_DEVICE_HAS_TERMINATED] = 1u;
            rk_d2h[rk_device_line + RK_DEVICE_STATE] = RK_STATE_ENDED;
        } else if (leader && flags == 0u) {
            rk_d2h[rk_device_line + RK_DEVICE_STATE] = RK_STATE_IDLE;
        }
        return;
    }
    uint beats = 0u;
    if (leader) {
        beats = rk_d2h[rk_device_line + RK_DEVICE_HEARTBEAT];
        if (rk_launch.telemetry != 0u) rk_load_telemetry();
        uint number = rk_d2h[rk_device_line + RK_DEVICE_SLICE_NUMBER];
        rk_d2h[rk_device_line + RK_DEVICE_SLICE_NUMBER] = number + 1u;
        rk_d2h[rk_device_line + RK_DEVICE_STATE] = RK_STATE_POLLING;
    }
    uint polls = clamp(idle_budget, 1u, RK_POLLS);
    uint given_back = rk_position, stored = rk_position, idle = 0u, spent = 4u, turn = 0u, looks = 0u;
    uint left = RK_LEFT_BUSY, prepared = rk_position - 1u;
    bool over = false;
    RK_SYNC

    // 1. Housekeeping: cursor, counters, signs of life.
    while (!over && (spent < budget || left == RK_LEFT_ERROR)) {
        bool due = false;
        spent += RK_HOUSEKEEPING_COST;
        // 2. A look at the host's commands, and whatever a message does not need each time.
        while (!due && !over && (spent < budget || left == RK_LEFT_ERROR)) {
            spent += RK_LOOK_COST;
            looks++;
            if (leader) {
                rk_show_progress();
                uint read;
                if (rk_passes()) {
                    read = rk_out_words_of[rk_reply_cursor];
                } else {
                    read = rk_h2d[rk_reply_cursor];
                }
                rk_news = uvec4(rk_commands(), read, 0u, 0u);
            }
            RK_SYNC
            flags = rk_news.x;
            uint unread = rk_out_position - rk_news.y;
            uint room = unread <= rk_out_capacity ? rk_out_capacity - unread : 0u;
#ifdef RK_TRACES
            rk_sampled = false;
#endif
            if (left == RK_LEFT_EXTENDED && room >= needed) {
                // Every reply carries its request's extension.
                uint from = rk_requests + rk_slot(rk_position) + RK_HEADER_WORDS;
                uint words = RK_EXTENSION_WORDS * needed;
                for (uint i = rk_thread(); i < words; i += rk_threads()) {
                    uint word = i & (RK_EXTENSION_WORDS - 1u);
                    uint slot = rk_slot_out(rk_out_position + i / RK_EXTENSION_WORDS);
                    rk_out_words_of[slot + RK_HEADER_WORDS + word] = rk_h2d[from + word];
                }
                spent += (words + rk_threads() - 1u) / rk_threads() + 1u;
                prepared = rk_position;
#ifdef RK_TRACES
                uvec4 id = uvec4(0u);
                if (rk_reads) id = rk_h2d4[(from >> 2) + 1u];
                rk_has_trace_id = subgroupShuffle(id.x | id.y | id.z | id.w, 0u) != 0u;
#endif
            }
            if (left == RK_LEFT_ERROR) {
                // Its slot was reserved when the handler was run.
                rk_left = 1u;
                if (leader) {
                    rk_out(0u, rk_error_code);
                    rk_d2h[rk_device_line + RK_DEVICE_LAST_ERROR] = rk_error_code;
                    uint at = rk_device_line + RK_DEVICE_DROPPED;
                    if (!rk_has_error) rk_d2h[at] = rk_d2h[at] + 1u;
                }
                if (rk_has_error) rk_add(rk_errors, 1u);
                rk_wants_again = false;
                rk_publish(0u, RK_ERROR_BIT, 4u);
                room--;
                rk_advance();
            }
            if (left == RK_LEFT_PASS_ON) {
                // As much of it as fits: its code comes first.
                rk_left = 1u;
                rk_wants_again = false;
                uint bytes = min(rk_bytes, rk_reply_limit);
                for (uint i = rk_thread(); i < (bytes + 3u) >> 2; i += rk_threads()) rk_out(i, rk_in(i));
                spent += bytes / (4u * rk_threads()) + 2u;
                rk_publish(0u, RK_ERROR_BIT, bytes);
                room--;
                rk_advance();
            }
            bool run = flags == RK_RUN;
#ifdef RK_TRACES
            // Its sample comes first.
            run = run && !rk_sampled;
#endif
            left = RK_LEFT_BUSY;
            // 3. Messages.
            uint message = 0u, until = min(spent + RK_ITERATIONS, budget);
            // Slots are given back by quarters of the ring.
            uint messages = min(RK_MESSAGES, give_back - (rk_position - given_back));
            while (run && message < messages && spent < until) {
                message++;
                // 4. Polls.
                uint sequence = 0u, expected = rk_position + 1u, poll = 0u;
                do {
                    if (RK_LOCKSTEP) {
                        if (leader) sequence = atomicOr(rk_h2d[rk_in_slot + RK_HEADER_SEQUENCE], 0u);
                    } else {
                        if (leader) rk_seen[turn & 1u] = rk_h2d[rk_in_slot + RK_HEADER_SEQUENCE];
                        barrier();
                        if (rk_reads) sequence = rk_seen[turn & 1u];
                    }
                    sequence = subgroupShuffle(sequence, 0u);
                    turn++;
                    poll++;
                } while (sequence != expected && poll < polls);
                spent += poll + 1u;
                if (sequence == expected) {
                    // The sequence was read before anything else of the slot is.
                    memoryBarrierBuffer();
                    rk_take();
#ifdef RK_TRACES
                    if (rk_step_number == 0u && prepared != rk_position) rk_seen_at = rk_clock();
#endif
                    bool extended = (rk_length_flags & RK_EXTENDED_BIT) != 0u && prepared != rk_position;
                    if (rk_bytes > 4u * rk_launch.slot_words - 4u * (rk_request - rk_in_slot)) {
                        rk_fault_code = RK_FAULT_CORRUPT_RING;
                    } else if (room < needed) {
                        left = RK_LEFT_NO_ROOM;
                        idle += polls;
                        run = false;
                    } else if (extended) {
                        left = RK_LEFT_EXTENDED;
                        run = false;
                    } else if ((rk_length_flags & RK_ERROR_BIT) != 0u) {
                        left = RK_LEFT_PASS_ON;
                        run = false;
                    } else if ((rk_kind_lane & 0xffffu) > rk_launch.kinds) {
                        left = RK_LEFT_ERROR;
                        rk_has_error = false;
                        rk_error_code = RK_BAD_REQUEST;
                        run = false;
                    } else {
                        idle = 0u;
                        rk_wants_again = false;
                        rk_has_error = false;
                        rk_left = rk_launch.replies;
                        rk_handler();
                        spent += rk_launch.message_cost;
                        rk_check_cut();
                        rk_agree()
                        room -= rk_launch.replies - rk_left;
                        prepared = rk_position - 1u;
                        if (rk_has_error) {
                            // An error after all replies that were declared is one too many.
                            if (rk_left == 0u && rk_launch.replies != 0u) rk_fault_code = RK_FAULT_TOO_MANY_REPLIES;
                            left = RK_LEFT_ERROR;
                            run = false;
                        } else if (rk_fault_code == RK_FAULT_NONE) {
                            rk_advance();
#ifdef RK_TRACES
                            run = !rk_sampled;
#endif
                        }
                    }
                    if (rk_fault_code != RK_FAULT_NONE) {
                        left = RK_LEFT_FAULT;
                        run = false;
                    }
                } else {
                    left = sequence == expected - capacity ? RK_LEFT_IDLE : RK_LEFT_FAULT;
                    if (left == RK_LEFT_FAULT) rk_fault_code = RK_FAULT_CORRUPT_RING;
                    idle += poll;
                    run = false;
                }
            }
            over = left != RK_LEFT_ERROR && (flags != RK_RUN || left == RK_LEFT_FAULT || idle >= idle_budget);
            bool quiet = left == RK_LEFT_IDLE || left == RK_LEFT_NO_ROOM;
            due = rk_position - given_back >= give_back || (quiet && stored != rk_position) ||
                  looks >= RK_LOOKS_PER_BEAT;
#ifdef RK_TRACES
            due = due || rk_sampled;
#endif
        }
#ifdef RK_TRACES
        // Before the request's slot is given back.
        if (rk_sampled) rk_trace();
        // Nothing more may be looked at before the slice ends.
        rk_sampled = false;
#endif
        looks = 0u;
        stored = rk_position;
        given_back = rk_position;
        // Every invocation has passed a barrier since it last read a request that is given back here.
        RK_SYNC
        if (leader) {
            rk_show_progress();
            rk_d2h[rk_request_cursor] = rk_position;
            rk_h2d[rk_link] = rk_position;
            rk_d2h[rk_device_line + RK_DEVICE_HEARTBEAT] = ++beats;
            rk_store_telemetry();
        }
    }
    // The loop was left although it had budget, and by none of its own exits: the driver cut it.
    if (!over && spent < budget) rk_fault_code = RK_FAULT_LOOP_CUT;
    // Others may go on: they must know.
    if (!RK_LOCKSTEP && rk_fault_code != RK_FAULT_NONE) rk_cut = rk_fault_code;
    if (!leader) return;
    memoryBarrierBuffer();
    if (rk_fault_code != RK_FAULT_NONE) {
        rk_d2h[rk_device_line + RK_DEVICE_FAULT] = rk_fault_code;
        memoryBarrierBuffer();
        rk_d2h[rk_device_line + RK_DEVICE_STATE] = RK_STATE_FAULTED;
    } else if (flags == RK_TERMINATE) {
        rk_d2h[rk_device_line + RK_DEVICE_HAS_TERMINATED] = 1u;
        memoryBarrierBuffer();
        rk_d2h[rk_device_line + RK_DEVICE_STATE] = RK_STATE_ENDED;
    } else if (flags == 0u) {
        rk_d2h[rk_device_line + RK_DEVICE_STATE] = RK_STATE_IDLE;
    }
}
