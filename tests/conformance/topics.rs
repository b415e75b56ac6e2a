//! Kernels that subscribe to topics.

use ringkernel::error::{RecvTimeoutError, Unavailable};
use ringkernel::kernel::DeadLetterReason;
use ringkernel::{
    Bytes, Error, Overflow, RingKernelRuntime, Subscriber, SubscriberOptions, Topic, TopicOptions,
};

use super::kernels::{Add, Stranger, Sum};
use super::{LONG, Subject, active, eventually, runtime, small};

fn topic(runtime: &RingKernelRuntime, name: &str) -> Topic<Bytes> {
    runtime.topic_bytes(name, TopicOptions::default()).unwrap()
}

/// Enough for all messages of a test.
fn roomy() -> SubscriberOptions {
    SubscriberOptions {
        capacity: Some(1024),
        overflow: Overflow::DropNewest,
        ..SubscriberOptions::default()
    }
}

fn recv(subscriber: &mut Subscriber<Bytes>) -> u32 {
    let mut buffer = [0; 48];
    let length = subscriber.recv_bytes_timeout(&mut buffer, LONG).unwrap();
    u32::from_ne_bytes(buffer[..length].try_into().unwrap())
}

/// What is published becomes requests, from the retained value on, in order and each once; the replies are published; other clients and
/// subscribers are not disturbed, and everything is in the accounts.
pub fn a_kernel_may_subscribe_to_a_topic<S: Subject>() {
    const MESSAGES: u32 = 500;
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", small());
    let (requests, replies) = (topic(&runtime, "requests"), topic(&runtime, "replies"));
    let mut publisher = requests.publisher().unwrap();
    let mut subscriber = replies.subscribe(roomy()).unwrap();
    for number in 0..3_u32 {
        publisher.publish_bytes(&number.to_ne_bytes()).unwrap();
    }
    // It comes late, and gets the last of them.
    let subscription = runtime
        .subscribe_kernel_publishing(&requests, &kernel, &replies, roomy())
        .unwrap();
    assert!(subscription.is_live());
    assert_eq!(
        (subscription.topic(), subscription.kernel()),
        ("requests", kernel.name())
    );
    assert!(matches!(
        kernel.split_bytes(),
        Err(Error::EndpointsBusy { .. })
    ));
    let mut client = kernel.client_bytes().unwrap();
    let mut buffer = [0; 48];
    for number in 3..MESSAGES {
        publisher.publish_bytes(&number.to_ne_bytes()).unwrap();
        if number % 50 == 0 {
            assert_eq!(client.call_bytes(b"client", &mut buffer, LONG), Ok(6));
        }
    }
    for number in 2..MESSAGES {
        assert_eq!(recv(&mut subscriber), number);
    }
    let carried = u64::from(MESSAGES - 2);
    // The bridge counts a reply after it has published it.
    eventually("the count of the last reply", || {
        subscription.stats().published == carried
    });
    let stats = subscription.stats();
    assert_eq!(
        (stats.messages.published, stats.messages.delivered),
        (carried, carried)
    );
    assert_eq!((stats.unpublished, stats.errors), (0, 0));
    // Once it is over, the kernel is its handle's again.
    drop((subscription, client));
    eventually("the kernel's release", || {
        kernel.call_bytes(b"handle", &mut buffer, LONG) == Ok(6)
    });
    publisher.publish_bytes(b"unheard").unwrap();
    eventually("the end of the subscription", || {
        requests.stats().unwrap().subscribers.is_empty()
    });
    let report = runtime.complete_shutdown().unwrap();
    // Nine calls of the client, and one of the handle.
    assert_eq!(report.requests.accepted, carried + 10);
    assert_eq!(report.requests.delivered, carried + 10);
    assert!(report.replies.adds_up());
    assert_eq!(report.replies.delivered, carried + 10);
    assert_eq!(
        (report.topics.accepted, report.topics.delivered),
        (2 * carried, 2 * carried)
    );
    assert!(report.topics.adds_up());
}

/// While a kernel takes nothing its messages wait in the subscription, which loses as it was told; while it has no room they wait too.
pub fn what_a_kernel_does_not_take_waits_in_its_subscription<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", small());
    let (requests, replies) = (topic(&runtime, "requests"), topic(&runtime, "replies"));
    let mut subscriber = replies.subscribe(roomy()).unwrap();
    let options = SubscriberOptions {
        capacity: Some(4),
        ..SubscriberOptions::default()
    };
    let subscription = runtime
        .subscribe_kernel_publishing(&requests, &kernel, &replies, options)
        .unwrap();
    let mut publisher = requests.publisher().unwrap();
    publisher.publish_bytes(&0_u32.to_ne_bytes()).unwrap();
    assert_eq!(recv(&mut subscriber), 0);
    kernel.deactivate().unwrap();
    for number in 1..=10_u32 {
        publisher.publish_bytes(&number.to_ne_bytes()).unwrap();
    }
    let stats = subscription.stats().messages;
    assert_eq!((stats.delivered, stats.dropped, stats.queued), (1, 6, 4));
    kernel.activate().unwrap();
    for number in 7..=10 {
        assert_eq!(recv(&mut subscriber), number);
    }
    drop((publisher, subscriber));
    // When the kernel ends so does the subscription, and what still waits goes to the dead letters.
    kernel.deactivate().unwrap();
    let mut publisher = requests.publisher().unwrap();
    publisher.publish_bytes(b"too late").unwrap();
    kernel.terminate().unwrap();
    eventually("the end of the subscription", || {
        requests.stats().unwrap().subscribers.is_empty()
    });
    assert!(!subscription.is_live());
    assert_eq!(requests.stats().unwrap().gone.queued, 1);
    let last = std::iter::from_fn(|| runtime.dead_letters().try_recv()).last();
    let last = last.unwrap();
    assert_eq!(
        (&*last.kernel, last.reason, &*last.payload),
        ("requests", DeadLetterReason::Shutdown, &b"too late"[..])
    );
    assert!(matches!(
        runtime.subscribe_kernel(&requests, &kernel, options),
        Err(Error::CannotSubscribe { .. })
    ));
}

/// A drain waits until what was published has been handled, by a kernel behind another one's topic too.
pub fn a_drain_delivers_what_was_published<S: Subject>() {
    let runtime = runtime::<S>();
    let (first, last) = (
        active(&runtime, "echo", small()),
        active(&runtime, "echo", small()),
    );
    let topics = ["a", "b", "c"].map(|name| topic(&runtime, name));
    // None of them needs to be held: they are carried as long as the subscriptions live.
    let subscriptions = [
        runtime.subscribe_kernel_publishing(&topics[0], &first, &topics[1], roomy()),
        runtime.subscribe_kernel_publishing(&topics[1], &last, &topics[2], roomy()),
    ];
    let mut subscriber = topics[2].subscribe(roomy()).unwrap();
    let mut publisher = topics[0].publisher().unwrap();
    for number in 0..300_u32 {
        publisher.publish_bytes(&number.to_ne_bytes()).unwrap();
    }
    assert!(runtime.drain(LONG).unwrap().complete);
    let mut buffer = [0; 48];
    for number in 0..300_u32 {
        assert_eq!(subscriber.try_recv_bytes(&mut buffer), Ok(4));
        assert_eq!(buffer[..4], number.to_ne_bytes());
    }
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        (report.requests.accepted, report.requests.delivered),
        (600, 600)
    );
    assert_eq!(report.topics.delivered, 900);
    assert_eq!((report.topics.accepted, report.topics.returned), (900, 0));
    assert_eq!(
        subscriber.recv_bytes_timeout(&mut buffer, LONG),
        Err(RecvTimeoutError::Unavailable(Unavailable::Closed))
    );
    drop(subscriptions);
}

fn add(left: u64) -> Add {
    Add {
        left,
        right: 7,
        negate: false,
    }
}

/// Types are those of the kernel's registration; what does not fit is refused.
pub fn typed_topics_go_to_kernels_of_their_types<S: Subject>() {
    // Before the first launch: some devices give no memory to others then.
    let others = runtime::<S>();
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.add", small());
    let adds = runtime
        .topic::<Add>("adds", TopicOptions::default())
        .unwrap();
    let sums = runtime
        .topic::<Sum>("sums", TopicOptions::default())
        .unwrap();
    let options = SubscriberOptions::default();
    let strangers = runtime
        .topic::<Stranger>("strangers", TopicOptions::default())
        .unwrap();
    assert!(matches!(
        runtime.subscribe_kernel(&strangers, &kernel, options),
        Err(Error::UnknownType { .. })
    ));
    assert!(matches!(
        runtime.subscribe_kernel_publishing(&adds, &kernel, &adds, options),
        Err(Error::CannotSubscribe { .. })
    ));
    let large = TopicOptions {
        message_size: Some(200),
        ..TopicOptions::default()
    };
    let large = runtime.topic_bytes("large", large).unwrap();
    assert!(matches!(
        runtime.subscribe_kernel(&large, &kernel, options),
        Err(Error::CannotSubscribe { .. })
    ));
    assert!(matches!(
        others.subscribe_kernel(&adds, &kernel, options),
        Err(Error::CannotSubscribe { .. })
    ));
    // Nothing has been changed by that.
    let mut sum = sums.subscribe(options).unwrap();
    let subscription = runtime
        .subscribe_kernel_publishing(&adds, &kernel, &sums, options)
        .unwrap();
    let mut publisher = adds.publisher().unwrap();
    for left in 0..50 {
        publisher.publish(&add(left)).unwrap();
        let value = i128::from(left) + 7;
        assert_eq!(sum.recv_timeout(LONG), Ok(Sum { value }));
    }
    // Replies of a type that the other topic does not have are lost, and said to be.
    drop(subscription);
    let bytes = topic(&runtime, "bytes");
    let mut subscription = None;
    eventually("the kernel's release", || {
        subscription = runtime
            .subscribe_kernel_publishing(&adds, &kernel, &bytes, options)
            .ok();
        subscription.is_some()
    });
    let subscription = subscription.unwrap();
    publisher.publish(&add(1)).unwrap();
    // That one, and the retained value before it.
    eventually("two replies", || subscription.stats().unpublished == 2);
    assert_eq!(runtime.dead_letters().counts().mismatched, 2);
    assert_eq!(bytes.stats().unwrap().published, 0);
}
