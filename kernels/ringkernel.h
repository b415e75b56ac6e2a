// The device half of a persistent kernel in C++, for CUDA and Metal (and a CPU, in tests): the layouts, the accessors that a
// handler is written against, and the polling loop. `ringkernel.cuh` and `ringkernel.metal` say what differs between the two
// and include this. It says the same as `shaders/ringkernel.glsl` says to Vulkan.
//
// Needed before it: RK_FN, RK_GLOBAL, RK_GROUP, RK_THREAD (address spaces), and functions of these names.
//
// rk_load, rk_store              a ring's word, relaxed, as the host sees it
// rk_load_acquire, rk_store_release
// rk_copy4                       four words, by one access where the device can
// rk_load4_acquire               four words, into what a block shares: the first before the rest, or all at once
// rk_fence                       orders stores as the host sees them
// rk_group_sync                  holds a block together, and shows each thread what the others wrote
// rk_nap                         gives way for some nanoseconds
// rk_as_f32, rk_from_f32, rk_mul_f32, rk_add_f32
//
// and RK_HAS_ADDRESSES where a kernel can use memory that it is told the address of while it runs: rk_at(low, high) is that memory;
// and where the device has them RK_HAS_U64 with rk_u64, RK_HAS_F64 with rk_as_f64 and rk_from_f64, RK_HAS_CLOCK with rk_clock_ns.

// Layouts. Sizes and offsets are in words of 4 bytes; a test compares each with the Rust structures of the same name.
#define RK_HEADER_WORDS 4u
#define RK_EXTENSION_WORDS 8u
#define RK_CURSOR_WORDS 32u
#define RK_HEADER_SEQUENCE 0u
#define RK_HEADER_CORRELATION 1u
#define RK_HEADER_LENGTH_FLAGS 2u
#define RK_HEADER_KIND_LANE 3u
#define RK_LENGTH_MASK 0x00ffffffu
#define RK_PRIORITY_MASK 0x03000000u
#define RK_ERROR_BIT 0x04000000u
#define RK_EXTENDED_BIT 0x08000000u
// The host's line of the control block, behind the request slots and the reply ring's cursor.
#define RK_HOST_ACTIVE 0u
#define RK_HOST_TERMINATE 1u
#define RK_HOST_SLICE_BUDGET 2u
#define RK_HOST_EPOCH 3u
#define RK_HOST_IDLE_BUDGET 4u
#define RK_HOST_CLOCK_ASKED 5u
#define RK_HOST_WAY 6u
#define RK_HOST_NEXT_SLOTS 7u
#define RK_HOST_NEXT_CURSOR 9u
#define RK_HOST_NEXT_CAPACITY 11u
#define RK_HOST_NEXT_SLOT_WORDS 12u
#define RK_HOST_NEXT_OFFSET 13u
#define RK_HOST_WORDS 16u
// Behind it the link, which other devices need, and the kinds of the kernel that replies are passed on to, by kinds of this one,
// two in a word.
#define RK_LINK_WORDS 16u
// A block's share of the state begins at a multiple of this.
#define RK_STATE_UNIT 16u
#define RK_NO_KIND 0xffffu
#define RK_MAX_KINDS 64u
// The device's lines, behind the reply slots and the request ring's cursor.
#define RK_DEVICE_PROCESSED 0u
#define RK_DEVICE_PRODUCED 1u
#define RK_DEVICE_STEP 2u
#define RK_DEVICE_PASSED 3u
#define RK_DEVICE_STATE 16u
#define RK_DEVICE_HEARTBEAT 17u
#define RK_DEVICE_DROPPED 18u
#define RK_DEVICE_LAST_ERROR 19u
#define RK_DEVICE_SLICE_NUMBER 20u
#define RK_DEVICE_HAS_TERMINATED 21u
#define RK_DEVICE_FAULT 22u
#define RK_DEVICE_WAY_TAKEN 23u
#define RK_DEVICE_WORDS 48u
// Telemetry, behind the device's lines. 64-bit counters, low word first.
#define RK_TELEMETRY_VERSION 0u
#define RK_TELEMETRY_RECEIVED 2u
#define RK_TELEMETRY_REPLIED 4u
#define RK_TELEMETRY_ERRORS 6u
#define RK_TELEMETRY_BYTES_IN 8u
#define RK_TELEMETRY_BYTES_OUT 10u
#define RK_TELEMETRY_WORDS 32u
// Traces, behind the telemetry: a line of the block's own, then samples.
#define RK_TRACE_SLOTS 256u
#define RK_TRACE_WORDS 16u
#define RK_TRACE_WRITTEN 0u
#define RK_TRACE_CLOCK_ANSWERED 1u
#define RK_TRACE_CLOCK 2u
#define RK_TRACE_HEADER_SEEN 4u
#define RK_TRACE_VERSION 0u
#define RK_TRACE_NUMBER 1u
#define RK_TRACE_CORRELATION 2u
#define RK_TRACE_SENT 4u
#define RK_TRACE_SEEN 6u
#define RK_TRACE_DONE 8u
#define RK_TRACE_TRACE_ID 12u
// Values of the `state` word.
#define RK_STATE_IDLE 1u
#define RK_STATE_POLLING 2u
#define RK_STATE_ENDED 3u
#define RK_STATE_FAULTED 4u
// Values of the `fault` word.
#define RK_FAULT_NONE 0u
#define RK_FAULT_CORRUPT_RING 1u
#define RK_FAULT_LOOP_CUT 2u
#define RK_FAULT_TOO_MANY_REPLIES 3u
// Codes of error replies, as in `HandlerError`.
#define RK_BAD_REQUEST 0xffffffffu
#define RK_REPLY_TOO_LARGE 0xfffffffeu

// What the host says once, at launch. Word for word `LaunchWords` of the host.
struct RkLaunch {
    uint host_to_device_words;  // From one block to the next, in words.
    uint device_to_host_words;
    uint state_words;           // Of one block.
    uint capacity;              // Slots of a ring.
    uint slot_words;
    uint epoch;                 // Of the launch; a slice of another epoch than the host's ends at once.
    uint message_cost;          // Of the slice's budget, for one run of the handler.
    uint replies;               // Replies that one run of the handler may write.
    uint kinds;                 // Kinds that the kernel takes, beside raw bytes.
    uint telemetry;             // Whether counters are kept.
    uint resident;              // Whether it stays until it is told to end; a slice otherwise.
    uint fresh;                 // Whether the state is to be zeroed first.
    uint slice_ns;              // How long a slice may take, on devices with a clock.
    uint nap_ns;                // Between two empty polls.
    uint trace_every;           // One request in so many is traced; 0 if none is.
};

// Most threads of a block.
#define RK_MAX_THREADS 1024u
// Words that a block's threads share, for handlers.
#define RK_SHARED_WORDS 1024u

// Where a block's replies go. Apart from each thread's view: it changes hardly ever, and registers are few.
struct RkWay {
    uint number;                 // That of the host's line. Even: into the own ring; odd: into that of another kernel.
    uint capacity, slot_words;   // Of that ring.
    uint beyond;                 // How many replies are produced beyond the position in it.
    uint passed;                 // Replies that were passed on by ways before.
    uint offset;                 // From the count of replies passed on to the position in another kernel's ring.
    uint known_kind, known_next; // A kind of this kernel's, and the other one's for it.
    uint cursor[2];              // The address of the other ring's cursor.
};

struct RkGroup {
    uint seen[2][8];
    RkWay way;
    // Counters that the first thread alone keeps.
    uint errors[2], replied[2];
    uint scratch[RK_MAX_THREADS];
    uint words[RK_SHARED_WORDS];
};

// One thread's view of its block.
struct Rk {
    RkLaunch launch;
    RK_GLOBAL uint* h2d;
    RK_GLOBAL uint* d2h;
    RK_GLOBAL uint* state;
    RK_GROUP RkGroup* group;
    uint index, threads, block, blocks;
    // Where the parts of this block's memory begin.
    RK_GLOBAL uint* reply_cursor;
    RK_GLOBAL uint* host_line;
    RK_GLOBAL uint* request_cursor;
    RK_GLOBAL uint* device_line;
    RK_GLOBAL uint* telemetry;
    // Positions of the rings, and how many replies the present run may still write.
    uint position, out_position, left;
    // The ring that replies go into: the own one, or that of another kernel.
    RK_GLOBAL uint* out_ring;
    // The request in hand, and how often the handler was run for it.
    RK_GLOBAL uint* request;
    uint correlation, length_flags, kind_lane, bytes, step;
    // The reply in the making, and the most bytes that fit.
    RK_GLOBAL uint* reply;
    uint reply_limit;
    // What the handler asked for.
    bool again, has_error;
    uint error_code, fault;
    // Further counters; all threads count alike, the first one stores.
    uint received[2], bytes_in[2], bytes_out[2];
    // Which half of `seen` is next.
    uint turn;
#ifdef RK_HAS_CLOCK
    // When the request in hand was taken up, and the last question for the clock that was answered. For thread 0.
    rk_u64 seen_at;
    uint clock_answered;
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// What a handler is written against. Functions marked [all] must be called by all threads of the block alike.

// Opens the handler: `RK_HANDLER { ... }`.
#define RK_HANDLER RK_FN void rk_handler(RK_THREAD Rk& rk)
RK_FN void rk_handler(RK_THREAD Rk& rk);

// This thread's index in its block, and their number; this block's index in the grid, and their number.
#define rk_thread() (rk.index)
#define rk_threads() (rk.threads)
#define rk_block() (rk.block)
#define rk_blocks() (rk.blocks)
// A loop over 0..n, shared by the threads of the block.
#define RK_FOR(i, n) for (uint i = rk.index; i < (n); i += rk.threads)
// Waits for all threads of the block, and shows each what the others wrote to state and shared words. [all]
#define rk_barrier() rk_group_sync(rk.threads)

// Every index is allowed, in every accessor below. A read beyond the end gives 0, and a write
// beyond it does nothing. A 64-bit value is beyond the end if either of its words is.

// The request's payload: its bytes, its words (the last one may be cut short), its kind (0 is raw bytes).
#define rk_in_bytes() (rk.bytes)
#define rk_in_words() ((rk.bytes + 3u) >> 2)
#define rk_in_kind() (rk.kind_lane & 0xffffu)
#define rk_in(i) rk_read_word(rk, i)
#define rk_in_i32(i) int(rk_in(i))
#define rk_in_f32(i) rk_as_f32(rk_in(i))
// Words that a reply can hold.
#define rk_out_words() (rk.reply_limit >> 2)
// Writes a word of the reply, whose end is that of its slot.
#define rk_out(i, value) rk_write_word(rk, i, value)
#define rk_out_i32(i, value) rk_out(i, uint(value))
#define rk_out_f32(i, value) rk_out(i, rk_from_f32(value))
// Copies `n` words of the request, from the first on, to the reply, shared by the threads of the
// block: as many as the request has and the reply holds. What it leaves in the up to three words
// behind them, to the next multiple of four, is not defined.
#define rk_out_copy(n) rk_copy_words(rk, n)

// The block's state words, zero at launch, and words that its threads share during one run of the handler (1024).
#define rk_state(i) rk_read_state(rk, i)
#define rk_set_state(i, value) rk_write_state(rk, i, value)
#define rk_shared(i) rk_read_shared(rk, i)
#define rk_set_shared(i, value) rk_write_shared(rk, i, value)

// Over the values of all threads, the same for each: sum, least, greatest. Floats are added in the order of a tree over the
// threads' indices. [all]
#define rk_sum_u32(value) rk_reduce_sum_u32(rk, value)
#define rk_min_u32(value) rk_reduce_min_u32(rk, value)
#define rk_max_u32(value) rk_reduce_max_u32(rk, value)
#define rk_sum_f32(value) rk_reduce_sum_f32(rk, value)
#define rk_min_f32(value) rk_reduce_min_f32(rk, value)
#define rk_max_f32(value) rk_reduce_max_f32(rk, value)

// How often the handler has been run for this request already; above 0 only after `rk_again`.
#define rk_step() (rk.step)
// Asks that the handler be run for the same request again, when there is room for its replies. [all]
#define rk_again() (rk.again = true)
// Fails the request: an error reply with this code follows when the handler returns. [all]
#define rk_error(code) (rk.has_error = true, rk.error_code = (code))
// Sends the reply: `bytes` of what `rk_out` wrote, of this kind, or of the request's, or raw. One
// more than the kernel declared for each run fails the kernel. A kind that does not fit its half of
// a word is one that no kernel knows. [all]
#define rk_reply_as(kind, bytes) rk_publish(rk, rk_half(kind), 0u, bytes)
#define rk_reply(bytes) rk_publish(rk, rk_in_kind(), 0u, bytes)
#define rk_reply_raw(bytes) rk_publish(rk, 0u, 0u, bytes)

// 64-bit values in two words, low word first. What a device lacks does not compile, and says so by its name.
#ifdef RK_HAS_U64
#define rk_in_u64(i) rk_read_u64(rk, i)
#define rk_out_u64(i, value) rk_write_u64(rk, i, value)
#else
#define rk_in_u64(i) rk_this_device_has_no_64_bit_integers
#define rk_out_u64(i, value) rk_this_device_has_no_64_bit_integers
#endif
#ifdef RK_HAS_F64
#define rk_in_f64(i) rk_as_f64(rk_in_u64(i))
#define rk_out_f64(i, value) rk_out_u64(i, rk_from_f64(value))
#else
#define rk_in_f64(i) rk_this_device_has_no_64_bit_floats
#define rk_out_f64(i, value) rk_this_device_has_no_64_bit_floats
#endif
// Nanoseconds of the device's own clock.
#ifdef RK_HAS_CLOCK
#define rk_time_ns() rk_clock_ns()
#else
#define rk_time_ns() rk_this_device_has_no_clock
#endif

// ---------------------------------------------------------------------------------------------------------------------
// What the loop is made of.

RK_FN RK_GLOBAL uint* rk_slot(RK_THREAD const Rk& rk, RK_GLOBAL uint* ring, uint position) {
    return ring + (position & (rk.launch.capacity - 1u)) * rk.launch.slot_words;
}

RK_FN uint rk_half(uint kind) { return kind < RK_NO_KIND ? kind : RK_NO_KIND; }

RK_FN uint rk_read_word(RK_THREAD const Rk& rk, uint i) { return i < rk_in_words() ? rk_load(rk.request + i) : 0u; }

RK_FN void rk_write_word(RK_THREAD Rk& rk, uint i, uint value) {
    if (i < rk_out_words() && rk.left != 0u) rk_store(rk.reply + i, value);
}

#ifdef RK_HAS_U64
// The largest index has none behind it.
RK_FN rk_u64 rk_read_u64(RK_THREAD const Rk& rk, uint i) {
    bool both = i < rk_in_words() && i + 1u < rk_in_words();
    return both ? rk_u64(rk_load(rk.request + i)) | rk_u64(rk_load(rk.request + i + 1u)) << 32 : rk_u64(0u);
}

RK_FN void rk_write_u64(RK_THREAD Rk& rk, uint i, rk_u64 value) {
    if (i < rk_out_words() && i + 1u < rk_out_words()) {
        rk_write_word(rk, i, uint(value));
        rk_write_word(rk, i + 1u, uint(value >> 32));
    }
}
#endif

RK_FN uint rk_read_state(RK_THREAD const Rk& rk, uint i) { return i < rk.launch.state_words ? rk.state[i] : 0u; }

RK_FN void rk_write_state(RK_THREAD const Rk& rk, uint i, uint value) {
    if (i < rk.launch.state_words) rk.state[i] = value;
}

RK_FN uint rk_read_shared(RK_THREAD const Rk& rk, uint i) { return i < RK_SHARED_WORDS ? rk.group->words[i] : 0u; }

RK_FN void rk_write_shared(RK_THREAD const Rk& rk, uint i, uint value) {
    if (i < RK_SHARED_WORDS) rk.group->words[i] = value;
}

RK_FN void rk_copy_words(RK_THREAD Rk& rk, uint n) {
    uint words = rk_out_words();
    if (rk_in_words() < words) words = rk_in_words();
    uint end = ((n < words ? n : words) + 3u) >> 2;
    if (rk.left == 0u) return;
    for (uint i = rk.index; i < end; i += rk.threads) rk_copy4(rk.reply + 4u * i, rk.request + 4u * i);
}

#define RK_REDUCTION(name, type, to, from, combine)                                    \
    RK_FN type name(RK_THREAD Rk& rk, type value) {                                    \
        rk.group->scratch[rk.index] = to(value);                                      \
        rk_group_sync(rk.threads);                                                     \
        for (uint span = RK_MAX_THREADS / 2u; span > 0u; span >>= 1) {                 \
            if (span < rk.threads) {                                                   \
                if (rk.index < span && rk.index + span < rk.threads) {               \
                    type a = from(rk.group->scratch[rk.index]);                       \
                    type b = from(rk.group->scratch[rk.index + span]);                \
                    rk.group->scratch[rk.index] = to(combine);                        \
                }                                                                      \
                rk_group_sync(rk.threads);                                             \
            }                                                                          \
        }                                                                              \
        type result = from(rk.group->scratch[0]);                                      \
        rk_group_sync(rk.threads);                                                     \
        return result;                                                                 \
    }
RK_REDUCTION(rk_reduce_sum_u32, uint, uint, uint, a + b)
RK_REDUCTION(rk_reduce_min_u32, uint, uint, uint, b < a ? b : a)
RK_REDUCTION(rk_reduce_max_u32, uint, uint, uint, b > a ? b : a)
RK_REDUCTION(rk_reduce_sum_f32, float, rk_from_f32, rk_as_f32, rk_add_f32(a, b))
RK_REDUCTION(rk_reduce_min_f32, float, rk_from_f32, rk_as_f32, b < a ? b : a)
RK_REDUCTION(rk_reduce_max_f32, float, rk_from_f32, rk_as_f32, b > a ? b : a)

RK_FN void rk_count(RK_THREAD uint* counter, uint value) {
    uint before = counter[0];
    counter[0] = before + value;
    if (counter[0] < before) counter[1]++;
}

RK_FN RK_GLOBAL uint* rk_slot_out(RK_THREAD const Rk& rk, uint position) {
    return rk.out_ring + (position & (rk.group->way.capacity - 1u)) * rk.group->way.slot_words;
}

// Words before the payload of the request in hand, and of its replies.
RK_FN uint rk_skip(RK_THREAD const Rk& rk) {
    return (rk.length_flags & RK_EXTENDED_BIT) != 0u ? RK_HEADER_WORDS + RK_EXTENSION_WORDS : RK_HEADER_WORDS;
}

RK_FN void rk_count_one(RK_GROUP uint* counter) {
    if (++counter[0] == 0u) counter[1]++;
}

RK_FN void rk_aim_reply(RK_THREAD Rk& rk) {
    uint skip = rk_skip(rk);
    rk.reply = rk_slot_out(rk, rk.out_position) + skip;
    rk.reply_limit = 4u * (rk.group->way.slot_words - skip);
}

// Whether replies go into another kernel's ring.
RK_FN bool rk_passes(RK_THREAD const Rk& rk) { return (rk.group->way.number & 1u) != 0u; }

// What the next kernel knows a kind by. [all]
RK_FN uint rk_kind_of_next(RK_THREAD const Rk& rk, uint kind) {
    if (kind != rk.group->way.known_kind) {
        rk_group_sync(rk.threads);
        if (rk.index == 0u) {
            uint index = kind - 1u, next = kind == 0u ? 0u : RK_NO_KIND;
            if (index < RK_MAX_KINDS) {
                uint pair = rk_load(rk.host_line + RK_HOST_WORDS + RK_LINK_WORDS + (index >> 1));
                next = (index & 1u) == 0u ? pair & 0xffffu : pair >> 16;
            }
            rk.group->way.known_kind = kind;
            rk.group->way.known_next = next;
        }
        rk_group_sync(rk.threads);
    }
    return rk.group->way.known_next;
}

// Publishes what `rk_out` wrote.
RK_FN void rk_publish(RK_THREAD Rk& rk, uint kind, uint flags, uint bytes) {
    bool passes = rk_passes(rk);
    if (passes) kind = rk_kind_of_next(rk, kind);
    if (rk.fault != RK_FAULT_NONE) {
        rk.left = 0u;
    } else if (passes && kind == RK_NO_KIND) {
        rk_error(RK_BAD_REQUEST);
    } else if (bytes > rk.reply_limit) {
        rk_error(RK_REPLY_TOO_LARGE);
    } else if (rk.left == 0u) {
        rk.fault = RK_FAULT_TOO_MANY_REPLIES;
    } else {
        // All of the payload is written before its sequence is.
        rk_group_sync(rk.threads);
        if (rk.index == 0u) {
            RK_GLOBAL uint* slot = rk_slot_out(rk, rk.out_position);
            rk_store(slot + RK_HEADER_CORRELATION, rk.correlation);
            rk_store(slot + RK_HEADER_LENGTH_FLAGS,
                     bytes | flags | (rk.length_flags & (RK_PRIORITY_MASK | RK_EXTENDED_BIT)));
            rk_store(slot + RK_HEADER_KIND_LANE, (rk.kind_lane & 0xffff0000u) | kind);
            rk_store_release(slot + RK_HEADER_SEQUENCE, rk.out_position + 1u);
            rk_count_one(rk.group->replied);
        }
        rk.out_position++;
        rk.left--;
        rk_count(rk.bytes_out, bytes);
        rk_aim_reply(rk);
    }
}

#ifdef RK_HAS_CLOCK
RK_FN void rk_store_time(RK_GLOBAL uint* at, rk_u64 time) {
    rk_store(at, uint(time));
    rk_store(at + 1, uint(time >> 32));
}

// Samples the request in hand, which is done with, if it is to be sampled. For thread 0.
RK_FN void rk_trace(RK_THREAD const Rk& rk) {
    RK_GLOBAL uint* extension = rk_slot(rk, rk.h2d, rk.position) + RK_HEADER_WORDS;
    uint sent[2] = {0u, 0u}, id[4] = {0u, 0u, 0u, 0u};
    if ((rk.length_flags & RK_EXTENDED_BIT) != 0u) {
        for (uint i = 0u; i < 2u; i++) sent[i] = rk_load(extension + i);
        for (uint i = 0u; i < 4u; i++) id[i] = rk_load(extension + 4u + i);
    }
    if (rk.position % rk.launch.trace_every != 0u && (id[0] | id[1] | id[2] | id[3]) == 0u) return;
    rk_u64 done = rk_clock_ns();
    RK_GLOBAL uint* header = rk.telemetry + RK_TELEMETRY_WORDS;
    uint number = rk_load(header + RK_TRACE_WRITTEN);
    RK_GLOBAL uint* slot = header + RK_TRACE_WORDS * (1u + (number & (RK_TRACE_SLOTS - 1u)));
    // A seqlock, as for the counters.
    uint version = rk_load(slot + RK_TRACE_VERSION);
    rk_store(slot + RK_TRACE_VERSION, version + 1u);
    rk_fence();
    rk_store(slot + RK_TRACE_NUMBER, number);
    rk_store(slot + RK_TRACE_CORRELATION, rk.correlation);
    for (uint i = 0u; i < 2u; i++) rk_store(slot + RK_TRACE_SENT + i, sent[i]);
    rk_store_time(slot + RK_TRACE_SEEN, rk.seen_at);
    rk_store_time(slot + RK_TRACE_DONE, done);
    for (uint i = 0u; i < 4u; i++) rk_store(slot + RK_TRACE_TRACE_ID + i, id[i]);
    rk_store_release(slot + RK_TRACE_VERSION, version + 2u);
    rk_store(header + RK_TRACE_WRITTEN, number + 1u);
}

// Tells the clock if the host has asked for it since. For thread 0.
RK_FN void rk_answer_clock(RK_THREAD Rk& rk) {
    if (rk.launch.trace_every == 0u) return;
    uint asked = rk_load_acquire(rk.host_line + RK_HOST_CLOCK_ASKED);
    if (asked == rk.clock_answered) return;
    rk.clock_answered = asked;
    RK_GLOBAL uint* header = rk.telemetry + RK_TELEMETRY_WORDS;
    rk_store_time(header + RK_TRACE_CLOCK, rk_clock_ns());
    rk_store_release(header + RK_TRACE_CLOCK_ANSWERED, asked);
}
#endif

// Goes on to the next request, or to the next run for the same one.
RK_FN void rk_advance(RK_THREAD Rk& rk) {
    if (rk.again) {
        rk.step++;
    } else {
#ifdef RK_HAS_CLOCK
        if (rk.launch.trace_every != 0u && rk.index == 0u) rk_trace(rk);
#endif
        rk.step = 0u;
        rk.position++;
        rk_count(rk.received, 1u);
        rk_count(rk.bytes_in, rk.bytes);
    }
}

// Answers the request in hand with an error: its own that came from a handler before this one, or the handler's (`counted`) or the loop's
// code. A reply's place was kept for it.
RK_FN void rk_fail_request(RK_THREAD Rk& rk, bool passes_on, bool counted) {
    // Whatever the handler's threads wrote to the reply comes before the code.
    rk_group_sync(rk.threads);
    rk.left = 1u;
    uint bytes = 4u;
    if (passes_on) {
        // As much of it as fits: its code comes first.
        bytes = rk.bytes < rk.reply_limit ? rk.bytes : rk.reply_limit;
        for (uint i = rk.index; i < (bytes + 3u) >> 2; i += rk.threads) rk_out(i, rk_in(i));
    } else if (rk.index == 0u) {
        rk_store(rk.reply, rk.error_code);
        rk_store(rk.device_line + RK_DEVICE_LAST_ERROR, rk.error_code);
        RK_GLOBAL uint* dropped = rk.device_line + RK_DEVICE_DROPPED;
        if (!counted) {
            rk_store(dropped, rk_load(dropped) + 1u);
        } else {
            rk_count_one(rk.group->errors);
        }
    }
    rk.again = false;
    rk_publish(rk, 0u, RK_ERROR_BIT, bytes);
    rk_advance(rk);
}

#define RK_RUN 1u
#define RK_TERMINATE 2u
#define RK_STALE 4u

// What the host wants, by its line as thread 0 has read it.
RK_FN uint rk_commands(RK_THREAD const Rk& rk, RK_GROUP const uint* host_line) {
    if (host_line[RK_HOST_EPOCH] != rk.launch.epoch) return RK_STALE;
    if (host_line[RK_HOST_TERMINATE] != 0u) return RK_TERMINATE;
    return host_line[RK_HOST_ACTIVE] != 0u ? RK_RUN : 0u;
}

// Leads replies to where the host's line says, at the start or because it has changed. [all]
RK_FN void rk_turn_to(RK_THREAD Rk& rk, uint number) {
    RK_GROUP RkWay& way = rk.group->way;
    uint produced = rk.out_position + way.beyond;
    uint passed = rk_passes(rk) ? rk.out_position - way.offset : way.passed;
    // Each thread has read what the first one changes.
    rk_group_sync(rk.threads);
    if (rk.index == 0u) {
        way.number = number;
        way.passed = passed;
        way.capacity = rk.launch.capacity;
        way.slot_words = rk.launch.slot_words;
        way.beyond = passed;
#ifdef RK_HAS_ADDRESSES
        if ((number & 1u) != 0u) {
            way.capacity = rk_load(rk.host_line + RK_HOST_NEXT_CAPACITY);
            way.slot_words = rk_load(rk.host_line + RK_HOST_NEXT_SLOT_WORDS);
            way.offset = rk_load(rk.host_line + RK_HOST_NEXT_OFFSET);
            way.beyond = produced - (passed + way.offset);
            way.known_kind = 0u;
            way.known_next = 0u;
            for (uint i = 0u; i < 2u; i++) way.cursor[i] = rk_load(rk.host_line + RK_HOST_NEXT_CURSOR + i);
        }
#endif
    }
    rk_group_sync(rk.threads);
    rk.out_position = produced - way.beyond;
    rk.out_ring = rk.d2h;
#ifdef RK_HAS_ADDRESSES
    if ((number & 1u) != 0u) {
        RK_GLOBAL uint* slots = rk.host_line + RK_HOST_NEXT_SLOTS;
        rk.out_ring = rk_at(rk_load(slots), rk_load(slots + 1));
    }
#endif
    rk_aim_reply(rk);
}

// How far whoever takes the replies has read. For thread 0.
RK_FN uint rk_read_up_to(RK_THREAD const Rk& rk) {
#ifdef RK_HAS_ADDRESSES
    if (rk_passes(rk)) return rk_load_acquire(rk_at(rk.group->way.cursor[0], rk.group->way.cursor[1]));
#endif
    return rk_load_acquire(rk.reply_cursor);
}

// Makes known how far the block has got. For thread 0.
RK_FN void rk_show_progress(RK_THREAD const Rk& rk) {
    rk_store(rk.device_line + RK_DEVICE_PRODUCED, rk.out_position + rk.group->way.beyond);
    if (rk_passes(rk)) rk_store(rk.device_line + RK_DEVICE_PASSED, rk.out_position - rk.group->way.offset);
    rk_store(rk.device_line + RK_DEVICE_STEP, rk.step);
#ifdef RK_HAS_CLOCK
    // A request that takes several slices was taken up once.
    if (rk.launch.trace_every != 0u) rk_store_time(rk.telemetry + RK_TELEMETRY_WORDS + RK_TRACE_HEADER_SEEN, rk.seen_at);
#endif
    rk_store_release(rk.device_line + RK_DEVICE_PROCESSED, rk.position);
}

RK_FN void rk_load_counter(RK_THREAD const Rk& rk, RK_THREAD uint* counter, uint word) {
    counter[0] = rk_load(rk.telemetry + word);
    counter[1] = rk_load(rk.telemetry + word + 1u);
}

RK_FN void rk_store_counter(RK_THREAD const Rk& rk, RK_THREAD const uint* counter, uint word) {
    rk_store(rk.telemetry + word, counter[0]);
    rk_store(rk.telemetry + word + 1u, counter[1]);
}

// A seqlock: the version is odd while the counters change. For thread 0.
RK_FN void rk_store_telemetry(RK_THREAD const Rk& rk) {
    if (rk.launch.telemetry == 0u) return;
    uint version = rk_load(rk.telemetry + RK_TELEMETRY_VERSION);
    rk_store(rk.telemetry + RK_TELEMETRY_VERSION, version + 1u);
    rk_fence();
    rk_store_counter(rk, rk.received, RK_TELEMETRY_RECEIVED);
    for (uint i = 0u; i < 2u; i++) {
        rk_store(rk.telemetry + RK_TELEMETRY_ERRORS + i, rk.group->errors[i]);
        rk_store(rk.telemetry + RK_TELEMETRY_REPLIED + i, rk.group->replied[i]);
    }
    rk_store_counter(rk, rk.bytes_in, RK_TELEMETRY_BYTES_IN);
    rk_store_counter(rk, rk.bytes_out, RK_TELEMETRY_BYTES_OUT);
    rk_store_release(rk.telemetry + RK_TELEMETRY_VERSION, version + 2u);
}

// ---------------------------------------------------------------------------------------------------------------------
// The loop.

// Polls between two looks at the host's commands (fewer if there are pauses, which shall not add up to more than a millisecond),
// and messages in between.
#define RK_POLLS 64u
#define RK_LOOK_NS 1000000u
#define RK_MESSAGES 128u
// Looks between two signs of life.
#define RK_LOOKS_PER_BEAT 8u

RK_FN void rk_begin(RK_THREAD Rk& rk) {
    uint slots = rk.launch.capacity * rk.launch.slot_words;
    rk.h2d += rk.block * rk.launch.host_to_device_words;
    rk.d2h += rk.block * rk.launch.device_to_host_words;
    rk.state += rk.block * ((rk.launch.state_words + RK_STATE_UNIT - 1u) & ~(RK_STATE_UNIT - 1u));
    rk.reply_cursor = rk.h2d + slots;
    rk.host_line = rk.reply_cursor + RK_CURSOR_WORDS;
    rk.request_cursor = rk.d2h + slots;
    rk.device_line = rk.request_cursor + RK_CURSOR_WORDS;
    rk.telemetry = rk.device_line + RK_DEVICE_WORDS;
    rk.position = rk_load(rk.device_line + RK_DEVICE_PROCESSED);
    rk.out_position = rk_load(rk.device_line + RK_DEVICE_PRODUCED);
    if (rk.index == 0u) {
        rk.group->way.number = 0u;
        rk.group->way.beyond = 0u;
        rk.group->way.passed = rk_load(rk.device_line + RK_DEVICE_PASSED);
        for (uint i = 0u; i < 2u; i++) {
            rk.group->errors[i] = rk_load(rk.telemetry + RK_TELEMETRY_ERRORS + i);
            rk.group->replied[i] = rk_load(rk.telemetry + RK_TELEMETRY_REPLIED + i);
        }
    }
    rk_group_sync(rk.threads);
    rk.step = rk_load(rk.device_line + RK_DEVICE_STEP);
    rk.left = 0u;
    rk.fault = RK_FAULT_NONE;
    rk.again = false;
    rk.has_error = false;
    rk.error_code = 0u;
    rk.correlation = 0u;
    rk.length_flags = 0u;
    rk.kind_lane = 0u;
    rk.bytes = 0u;
    rk.turn = 0u;
    rk.request = rk.h2d;
    rk_load_counter(rk, rk.received, RK_TELEMETRY_RECEIVED);
    rk_load_counter(rk, rk.bytes_in, RK_TELEMETRY_BYTES_IN);
    rk_load_counter(rk, rk.bytes_out, RK_TELEMETRY_BYTES_OUT);
#ifdef RK_HAS_CLOCK
    rk.seen_at = 0u;
    rk.clock_answered = 0u;
    if (rk.launch.trace_every != 0u) {
        RK_GLOBAL uint* header = rk.telemetry + RK_TELEMETRY_WORDS;
        RK_GLOBAL uint* seen = header + RK_TRACE_HEADER_SEEN;
        rk.seen_at = rk_u64(rk_load(seen)) | rk_u64(rk_load(seen + 1)) << 32;
        rk.clock_answered = rk_load(header + RK_TRACE_CLOCK_ANSWERED);
    }
#endif
    rk_turn_to(rk, 0u);
}

// Cursor, counters, signs of life.
RK_FN void rk_housekeeping(RK_THREAD const Rk& rk, uint beats) {
    // Every thread is done with the requests that are given back here.
    rk_group_sync(rk.threads);
    if (rk.index == 0u) {
        rk_show_progress(rk);
        rk_store_release(rk.request_cursor, rk.position);
        rk_store(rk.device_line + RK_DEVICE_HEARTBEAT, beats);
        rk_store_telemetry(rk);
    }
}

// Takes up the published request at the present position, whose header thread 0 has read.
RK_FN void rk_take(RK_THREAD Rk& rk, RK_GROUP const uint* seen) {
    rk.correlation = seen[RK_HEADER_CORRELATION];
    rk.length_flags = seen[RK_HEADER_LENGTH_FLAGS];
    rk.kind_lane = seen[RK_HEADER_KIND_LANE];
    rk.bytes = rk.length_flags & RK_LENGTH_MASK;
    rk.request = rk_slot(rk, rk.h2d, rk.position) + RK_HEADER_WORDS;
    if ((rk.length_flags & RK_EXTENDED_BIT) != 0u) rk.request += RK_EXTENSION_WORDS;
    rk_aim_reply(rk);
}

// Gives every reply that the handler may write its request's extension.
RK_FN void rk_extend_replies(RK_THREAD const Rk& rk, uint replies) {
    RK_GLOBAL uint* from = rk_slot(rk, rk.h2d, rk.position) + RK_HEADER_WORDS;
    for (uint i = rk.index; i < RK_EXTENSION_WORDS * replies; i += rk.threads) {
        uint word = i & (RK_EXTENSION_WORDS - 1u);
        RK_GLOBAL uint* slot = rk_slot_out(rk, rk.out_position + i / RK_EXTENSION_WORDS);
        rk_store(slot + RK_HEADER_WORDS + word, rk_load(from + word));
    }
}

// Handles the request in hand; what it costs of the budget.
RK_FN uint rk_handle(RK_THREAD Rk& rk, uint needed) {
#ifdef RK_HAS_CLOCK
    if (rk.launch.trace_every != 0u && rk.index == 0u && rk.step == 0u) rk.seen_at = rk_clock_ns();
#endif
    if ((rk.length_flags & RK_EXTENDED_BIT) != 0u) rk_extend_replies(rk, needed);
    rk.again = false;
    rk.has_error = false;
    rk.left = rk.launch.replies;
    // An error of a handler before this one is seen by no other.
    bool passes_on = (rk.length_flags & RK_ERROR_BIT) != 0u;
    bool handled = !passes_on && (rk.kind_lane & 0xffffu) <= rk.launch.kinds;
    if (handled) {
        rk_handler(rk);
        // An error after all replies that were declared is one too many.
        if (rk.fault == RK_FAULT_NONE && rk.has_error && rk.left == 0u && rk.launch.replies != 0u) {
            rk.fault = RK_FAULT_TOO_MANY_REPLIES;
        }
    } else {
        rk.error_code = RK_BAD_REQUEST;
    }
    if (rk.fault == RK_FAULT_NONE) {
        if (handled && !rk.has_error) {
            rk_advance(rk);
        } else {
            rk_fail_request(rk, passes_on, handled);
        }
    }
    return handled ? rk.launch.message_cost : 1u;
}

// One block of a slice, or of a launch that stays.
RK_FN void rk_run(RK_THREAD Rk& rk) {
    rk_begin(rk);
    bool leader = rk.index == 0u;
    uint capacity = rk.launch.capacity;
    uint give_back = capacity >> 2 > 0u ? capacity >> 2 : 1u;
    uint needed = rk.launch.replies > 0u ? rk.launch.replies : 1u;
    uint beats = rk_load(rk.device_line + RK_DEVICE_HEARTBEAT);
    uint given_back = rk.position, stored = rk.position, idle = 0u, spent = 0u, looks = 0u, commands = 0u;
    bool polling = false;
    uint polls = RK_POLLS;
    if (rk.launch.nap_ns > RK_LOOK_NS / RK_POLLS) {
        polls = RK_LOOK_NS / rk.launch.nap_ns > 0u ? RK_LOOK_NS / rk.launch.nap_ns : 1u;
    }
#ifdef RK_HAS_CLOCK
    rk_u64 begin = rk_clock_ns();
#endif
    if (rk.launch.fresh) {
        for (uint i = rk.index; i < rk.launch.state_words; i += rk.threads) rk.state[i] = 0u;
    }
    if (leader) {
        uint state = rk_load(rk.device_line + RK_DEVICE_STATE);
        rk.group->seen[0][0] = state == RK_STATE_FAULTED || state == RK_STATE_ENDED ? RK_STALE : 0u;
    }
    rk_group_sync(rk.threads);
    bool ended = rk.group->seen[0][0] == RK_STALE;
    // A slice behind the last one has nothing to say: least of all that its block is idle.
    if (ended) commands = RK_STALE;
    rk.turn = 1u;

    while (!ended) {
        // A look at the host's commands. All threads go by what one of them read.
        RK_GROUP uint* news = rk.group->seen[rk.turn & 1u];
        if (leader) {
            rk_show_progress(rk);
            rk_load4_acquire(rk.host_line, news);
            news[RK_HOST_IDLE_BUDGET] = rk_load(rk.host_line + RK_HOST_IDLE_BUDGET);
            news[5] = rk_load_acquire(rk.host_line + RK_HOST_WAY);
            news[7] = rk_read_up_to(rk);
#ifdef RK_HAS_CLOCK
            news[6] = rk_clock_ns() - begin > rk.launch.slice_ns ? 1u : 0u;
            rk_answer_clock(rk);
#endif
        }
        rk_group_sync(rk.threads);
        commands = rk_commands(rk, news);
        uint unread = rk.out_position - news[7];
        bool late = false;
#ifdef RK_HAS_CLOCK
        // Each thread has a clock of its own: what the first one saw counts.
        late = news[6] != 0u;
#endif
        uint budget = news[RK_HOST_SLICE_BUDGET], idle_budget = news[RK_HOST_IDLE_BUDGET];
        uint room = unread <= rk.group->way.capacity ? rk.group->way.capacity - unread : 0u;
        uint way = news[5];
        rk.turn++;
        looks++;
        if (way != rk.group->way.number) {
            // There is room to be looked for elsewhere.
            room = 0u;
            rk_turn_to(rk, way);
            if (leader) rk_store_release(rk.device_line + RK_DEVICE_WAY_TAKEN, way);
        }

        bool quiet = false;
        if (commands == RK_RUN) {
            if (!polling) {
                polling = true;
                if (leader) {
                    uint number = rk_load(rk.device_line + RK_DEVICE_SLICE_NUMBER);
                    rk_store(rk.device_line + RK_DEVICE_SLICE_NUMBER, number + 1u);
                    rk_store_release(rk.device_line + RK_DEVICE_STATE, RK_STATE_POLLING);
                }
            }
            uint left = give_back - (rk.position - given_back);
            uint messages = left < RK_MESSAGES ? left : RK_MESSAGES;
            for (uint message = 0u; message < messages && !quiet && rk.fault == RK_FAULT_NONE; message++) {
                RK_GLOBAL uint* slot = rk_slot(rk, rk.h2d, rk.position);
                RK_GROUP uint* seen = news;
                uint expected = rk.position + 1u, sequence = 0u, poll = 0u;
                do {
                    seen = rk.group->seen[rk.turn & 1u];
                    if (leader) {
                        if (poll > 0u) rk_nap(rk.launch.nap_ns);
                        rk_load4_acquire(slot, seen);
                    }
                    rk_group_sync(rk.threads);
                    sequence = seen[RK_HEADER_SEQUENCE];
                    rk.turn++;
                    poll++;
                } while (sequence != expected && poll < polls);
                spent += poll;
                if (sequence != expected) {
                    idle += poll;
                    quiet = true;
                    if (sequence != expected - capacity) rk.fault = RK_FAULT_CORRUPT_RING;
                    break;
                }
                rk_take(rk, seen);
                if (rk.bytes > 4u * (rk.launch.slot_words - rk_skip(rk))) {
                    rk.fault = RK_FAULT_CORRUPT_RING;
                } else if (room < needed) {
                    idle += RK_POLLS;
                    quiet = true;
                    if (leader) rk_nap(rk.launch.nap_ns);
                } else {
                    idle = 0u;
                    uint before = rk.out_position;
                    spent += rk_handle(rk, needed);
                    room -= rk.out_position - before;
                }
                if (!rk.launch.resident && spent >= budget) break;
            }
        } else if (commands == 0u && rk.launch.resident) {
            // Deactivated: it stays, and looks now and then.
            if (polling) {
                polling = false;
                rk_housekeeping(rk, ++beats);
                given_back = stored = rk.position;
                if (leader) rk_store_release(rk.device_line + RK_DEVICE_STATE, RK_STATE_IDLE);
            }
            if (leader) rk_nap(rk.launch.nap_ns > 1000u ? rk.launch.nap_ns : 1000u);
        }
        ended = commands == RK_STALE || commands == RK_TERMINATE || rk.fault != RK_FAULT_NONE ||
                (!rk.launch.resident && (commands != RK_RUN || late || spent >= budget || idle >= idle_budget));
        if (ended || rk.position - given_back >= give_back || (quiet && stored != rk.position) ||
            looks >= RK_LOOKS_PER_BEAT) {
            looks = 0u;
            rk_housekeeping(rk, ++beats);
            given_back = stored = rk.position;
        }
    }
    if (!leader) return;
    if (rk.fault != RK_FAULT_NONE) {
        rk_store(rk.device_line + RK_DEVICE_FAULT, rk.fault);
        rk_store_release(rk.device_line + RK_DEVICE_STATE, RK_STATE_FAULTED);
    } else if (commands == RK_TERMINATE) {
        rk_store(rk.device_line + RK_DEVICE_HAS_TERMINATED, 1u);
        rk_store_release(rk.device_line + RK_DEVICE_STATE, RK_STATE_ENDED);
    } else if (commands == 0u) {
        rk_store_release(rk.device_line + RK_DEVICE_STATE, RK_STATE_IDLE);
    }
}
