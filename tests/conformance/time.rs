//! Time: clocks that order the messages of several kernels.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ringkernel::time::HlcTimestamp;
use ringkernel::{Bytes, Hlc, LaunchOptions, Receiver, SendOptions, Sender};

use super::{LONG, Subject, active, runtime};

/// Says that it is over, also when a test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends a stamped message through an echo kernel; the stamp that came back.
fn stamp(ends: &mut (Sender<Bytes>, Receiver<Bytes>)) -> HlcTimestamp {
    let stamped = SendOptions {
        timestamp: true,
        ..SendOptions::default()
    };
    ends.0.try_send_bytes_with(b"", &stamped).unwrap();
    let reply = ends.1.recv_ref_timeout(LONG).unwrap();
    HlcTimestamp::from_u64(reply.extension().unwrap().timestamp_ns)
}

pub fn what_happened_before_is_stamped_lower_across_kernels_and_clocks<S: Subject>() {
    let runtime = runtime::<S>();
    // Two kernels of one clock, and one whose clock knows of that by messages alone.
    let (near, far) = (Arc::new(Hlc::new()), Arc::new(Hlc::new()));
    let launch = |clock: &Arc<Hlc>| {
        let options = LaunchOptions {
            extended: true,
            hlc: Some(Arc::clone(clock)),
            ..LaunchOptions::default()
        };
        let kernel = active(&runtime, "echo", options);
        kernel.split_bytes().unwrap()
    };
    let (mut first, mut second, mut third) = (launch(&near), launch(&near), launch(&far));
    // Somebody else draws on both clocks meanwhile.
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = Over(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert!(near.now() < near.now());
                assert!(far.now() < far.now());
                std::thread::yield_now();
            }
        });
        let mut last = near.now();
        let mut after = |stamp: HlcTimestamp| {
            assert!(last < stamp, "{last:?} is not before {stamp:?}");
            last = stamp;
            stamp
        };
        for _ in 0..200 {
            after(stamp(&mut first));
            let sent = after(stamp(&mut second));
            after(far.update(sent).unwrap());
            let answered = after(stamp(&mut third));
            after(near.update(answered).unwrap());
        }
    });
}
