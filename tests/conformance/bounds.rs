//! Indices that handlers on devices compute: none reaches beyond what the accessor is for.

use ringkernel::error::HandlerError;
use ringkernel::kernel::FailureReason;
use ringkernel::{KernelHandle, KernelState, LaunchOptions, SendOptions};

use super::{LONG, Subject, eventually, runtime, small};

/// What `test.bounds` does, by its number.
const IN: u32 = 1;
const IN_I32: u32 = 2;
const IN_F32: u32 = 3;
const IN_U64: u32 = 4;
const IN_F64: u32 = 5;
const STATE: u32 = 6;
const SET_STATE: u32 = 7;
const SHARED: u32 = 8;
const SET_SHARED: u32 = 9;
const REPLY: u32 = 10;
const REPLY_AS: u32 = 11;
const OUT: u32 = 20;
const OUT_F32: u32 = 21;
const OUT_U64: u32 = 22;
const OUT_F64: u32 = 23;
const OUT_COPY: u32 = 24;
const FILL: u32 = 25;

/// Words of the state of `test.bounds`, of a slot's payload, and those that a block's threads
/// share.
const STATE_WORDS: u32 = 5;
const SLOT_WORDS: u32 = 12;
const SHARED_WORDS: u32 = 1024;

/// Slots of a ring.
const CAPACITY: u32 = 16;

const PATTERN: u32 = 0x5a5a_5a5a;

/// Indices from `end` on: just beyond, further, such that their bytes wrap around, and the last
/// ones, which lie before what begins at 0.
fn beyond(end: u32) -> Vec<u32> {
    let mut indices = vec![end, end + 1, end + 3, end + 15, end + 64, end + 4096];
    for wrap in [
        0x3fff_ffff,
        0x4000_0000,
        0x7fff_ffff,
        0x8000_0000,
        0xc000_0000,
    ] {
        indices.extend([wrap, wrap + end]);
    }
    indices.extend((0..40).map(|back| u32::MAX - back));
    indices
}

/// What a kernel answers, in words.
fn ask(kernel: &KernelHandle, request: &[u32], key: u64) -> Vec<u32> {
    let payload: Vec<u8> = request.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let options = SendOptions {
        key: Some(key),
        ..SendOptions::default()
    };
    kernel.send_bytes_with(&payload, &options, LONG).unwrap();
    let mut reply = [0; 4 * SLOT_WORDS as usize];
    let bytes = kernel.recv_bytes_timeout(&mut reply, LONG).unwrap();
    let words = reply[..bytes].chunks_exact(4);
    words
        .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
        .collect()
}

/// A block of several threads, whose requests' slots hold what is left of longer messages.
fn launch<S: Subject>(id: &str, blocks: u32) -> (ringkernel::RingKernelRuntime, KernelHandle) {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        message_size: Some(4 * SLOT_WORDS as usize),
        ..small()
    };
    let kernel = runtime.launch(id, blocks, 32, options).unwrap();
    kernel.activate().unwrap();
    for key in 0..u64::from(blocks) * 4 {
        fill(&kernel, key);
    }
    (runtime, kernel)
}

/// Fills all slots of the rings of the block that a key leads to.
fn fill(kernel: &KernelHandle, key: u64) {
    for _ in 0..CAPACITY {
        let mut request = [PATTERN; SLOT_WORDS as usize];
        request[0] = FILL;
        let reply = ask(kernel, &request, key);
        assert_eq!(reply, [PATTERN; SLOT_WORDS as usize]);
    }
}

pub fn a_read_beyond_the_end_gives_zero<S: Subject>() {
    let (_runtime, kernel) = launch::<S>("test.bounds", 1);
    for at in beyond(3) {
        for what in [IN, IN_I32, IN_F32, IN_U64, IN_F64] {
            let reply = ask(&kernel, &[what, at, PATTERN], 0);
            assert_eq!(reply[..2], [0, 0], "access {what} at {at:#x}");
        }
    }
    // Of a value of two words neither may lie beyond the end.
    assert_eq!(ask(&kernel, &[IN, 2, PATTERN], 0)[..2], [PATTERN, 0]);
    assert_eq!(ask(&kernel, &[IN_U64, 1, PATTERN], 0)[..2], [1, PATTERN]);
    for what in [IN_U64, IN_F64] {
        assert_eq!(ask(&kernel, &[what, 2, PATTERN], 0)[..2], [0, 0]);
    }
    for at in beyond(STATE_WORDS) {
        assert_eq!(ask(&kernel, &[STATE, at, 0], 0)[0], 0, "state at {at:#x}");
    }
    for at in beyond(SHARED_WORDS) {
        assert_eq!(ask(&kernel, &[SHARED, at, 0], 0)[0], 0, "shared at {at:#x}");
    }
}

pub fn a_write_beyond_the_end_is_dropped<S: Subject>() {
    let (_runtime, kernel) = launch::<S>("test.bounds", 1);
    for at in 0..STATE_WORDS {
        assert_eq!(ask(&kernel, &[SET_STATE, at, 100 + at], 0)[0], 100 + at);
    }
    let state: Vec<u32> = (0..STATE_WORDS).map(|at| 100 + at).collect();
    let untouched = |request: &[u32]| {
        let reply = ask(&kernel, request, 0);
        // What it read, and what else there is: threads that count themselves, and the state.
        assert_eq!(reply[0], 0, "{request:x?}");
        assert_eq!((reply[2], reply[3]), (0, 32), "{request:x?}");
        assert_eq!(reply[4..], state, "{request:x?}");
    };
    for at in beyond(STATE_WORDS) {
        untouched(&[SET_STATE, at, PATTERN]);
    }
    for at in beyond(SHARED_WORDS) {
        untouched(&[SET_SHARED, at, PATTERN]);
    }
    for at in [0, 1, SHARED_WORDS - 1] {
        assert_eq!(ask(&kernel, &[SET_SHARED, at, PATTERN], 0)[0], PATTERN);
    }
    // A reply's slot, which was filled before, and those around it.
    fill(&kernel, 0);
    let last = SLOT_WORDS - 1;
    for what in [OUT, OUT_F32, OUT_U64, OUT_F64] {
        for at in beyond(SLOT_WORDS) {
            let reply = ask(&kernel, &[what, at, 7], 0);
            assert_eq!(reply, [PATTERN; SLOT_WORDS as usize], "{what} at {at:#x}");
        }
    }
    for what in [OUT_U64, OUT_F64] {
        let reply = ask(&kernel, &[what, last, 7], 0);
        assert_eq!(reply, [PATTERN; SLOT_WORDS as usize], "half a value");
    }
    assert_eq!(ask(&kernel, &[OUT, last, 7], 0)[last as usize], 7);
    fill(&kernel, 0);
    for words in beyond(3) {
        let request = [OUT_COPY, words, 7];
        let reply = ask(&kernel, &request, 0);
        assert_eq!(reply[..3], request);
        // The fourth is not defined; what lies behind it is not the request's.
        assert_eq!(
            reply[4..],
            [PATTERN; SLOT_WORDS as usize - 4],
            "{words:#x} words"
        );
    }
    // A reply that is longer than its slot.
    for bytes in beyond(4 * SLOT_WORDS + 1) {
        let request = [REPLY, bytes, 0].map(u32::to_ne_bytes).concat();
        kernel.send_bytes(&request).unwrap();
        let error = kernel.recv_bytes_timeout(&mut [0; 48], LONG).unwrap_err();
        let code = HandlerError::REPLY_TOO_LARGE;
        assert!(
            format!("{error:?}").contains(&code.to_string()),
            "{error:?}"
        );
    }
    untouched(&[STATE, STATE_WORDS, 0]);
}

pub fn no_block_reaches_the_state_of_another<S: Subject>() {
    let (_runtime, kernel) = launch::<S>("test.bounds", 2);
    // Keys that lead to one block each.
    let key_of = |block: u32| {
        (0..64_u64)
            .find(|key| ask(&kernel, &[STATE, 0, 0], *key)[2] == block)
            .unwrap()
    };
    let keys = [key_of(0), key_of(1)];
    for (key, value) in keys.into_iter().zip([100, 200]) {
        for at in 0..STATE_WORDS {
            ask(&kernel, &[SET_STATE, at, value], key);
        }
    }
    for key in keys {
        for at in beyond(STATE_WORDS) {
            assert_eq!(ask(&kernel, &[SET_STATE, at, 7], key)[0], 0, "at {at:#x}");
        }
    }
    for (key, value) in keys.into_iter().zip([100, 200]) {
        let reply = ask(&kernel, &[STATE, 0, 0], key);
        assert_eq!(reply[4..], [value; STATE_WORDS as usize]);
    }
}

pub fn a_kernel_without_state_has_no_state_words<S: Subject>() {
    let (_runtime, kernel) = launch::<S>("test.bounds.stateless", 1);
    for at in (0..200).chain(beyond(0)) {
        let reply = ask(&kernel, &[SET_STATE, at, 7], 0);
        assert_eq!((reply[0], reply[3]), (0, 32), "at {at:#x}");
        assert_eq!(reply[4..], [0; STATE_WORDS as usize], "at {at:#x}");
    }
    kernel.terminate().unwrap();
    assert_eq!(kernel.metrics().dropped, 0);
}

pub fn a_reply_of_a_kind_that_does_not_exist_fails_its_kernel_alone<S: Subject>() {
    // The upper half of the word is the lane that the reply goes to.
    for kind in [3, 0xffff, 0x1_0000, 0x1_0003, u32::MAX] {
        let (runtime, kernel) = launch::<S>("test.bounds", 1);
        let other = runtime.launch("echo", 1, 1, small()).unwrap();
        other.activate().unwrap();
        let request = [REPLY_AS, kind, 0].map(u32::to_ne_bytes).concat();
        kernel.send_bytes(&request).unwrap();
        assert!(kernel.recv_bytes_timeout(&mut [0; 48], LONG).is_err());
        eventually("the failure", || {
            kernel.status().state == KernelState::Failed
        });
        let failure = kernel.status().failure.unwrap();
        assert_eq!(failure.reason, FailureReason::CorruptRing, "kind {kind:#x}");
        assert_eq!(other.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    }
}
