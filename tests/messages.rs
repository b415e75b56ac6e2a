//! What messages of ordinary types may hold, and what bytes of others cannot do to those who read
//! them.

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use ringkernel::error::{
    CallError, HandlerError, MessageError, RecvTimeoutError, Rejection, SendTimeoutError,
    TryRecvError, TrySendError,
};
use ringkernel::message::RingMessage;
use ringkernel::message::codec::{CodecError, MAX_DEPTH};
use ringkernel::{
    BackendType, KernelHandle, KernelRegistration, LaunchOptions, RingKernelRuntime, SendOptions,
    SubscriberOptions, TopicOptions,
};
use rkyv::{Archive, Deserialize, Serialize};

/// A wait that ends with this has failed.
const LONG: Duration = Duration::from_secs(30);

/// A type that contains itself.
#[derive(Archive, Serialize, Deserialize, Debug, PartialEq)]
#[rkyv(serialize_bounds(__S: rkyv::ser::Writer + rkyv::ser::Allocator, __S::Error: rkyv::rancor::Source))]
#[rkyv(deserialize_bounds(__D::Error: rkyv::rancor::Source))]
#[rkyv(bytecheck(bounds(__C: rkyv::validation::ArchiveContext, __C::Error: rkyv::rancor::Source)))]
enum Chain {
    Link {
        number: u64,
        #[rkyv(omit_bounds)]
        next: Box<Chain>,
    },
    End,
}
ringkernel::ring_message!(Chain, "test.Chain.v1");

/// One whose levels are vectors of large values.
#[derive(Archive, Serialize, Deserialize, Debug, PartialEq)]
#[rkyv(serialize_bounds(__S: rkyv::ser::Writer + rkyv::ser::Allocator, __S::Error: rkyv::rancor::Source))]
#[rkyv(deserialize_bounds(__D::Error: rkyv::rancor::Source))]
#[rkyv(bytecheck(bounds(__C: rkyv::validation::ArchiveContext, __C::Error: rkyv::rancor::Source)))]
struct Tree {
    payload: [u64; 32],
    #[rkyv(omit_bounds)]
    children: Vec<Tree>,
}
ringkernel::ring_message!(Tree, "test.Tree.v1");

fn chain(links: u64) -> Chain {
    (0..links).fold(Chain::End, |next, number| Chain::Link {
        number,
        next: Box::new(next),
    })
}

/// The archive of a chain of this many links.
fn chain_bytes(links: u64) -> Vec<u8> {
    let make = move || {
        let chain = chain(links);
        let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(&chain)
            .unwrap()
            .to_vec();
        // Dropping it recurses as well.
        std::mem::forget(chain);
        bytes
    };
    with_stack(1 << 28, make)
}

/// Runs it on a thread with this much stack, in bytes.
fn with_stack<R: Send>(bytes: usize, run: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| {
        thread::Builder::new()
            .stack_size(bytes)
            .spawn_scoped(scope, run)
            .unwrap()
            .join()
            .unwrap()
    })
}

fn runtime(kernel: KernelRegistration) -> RingKernelRuntime {
    RingKernelRuntime::builder()
        .backend(BackendType::Cpu)
        .register(kernel)
        .build()
        .unwrap()
}

fn active(runtime: &RingKernelRuntime, id: &str) -> KernelHandle {
    let kernel = runtime.launch(id, 1, 1, LaunchOptions::default()).unwrap();
    kernel.activate().unwrap();
    kernel
}

#[test]
fn an_archive_may_be_nested_as_deep_as_is_said_and_no_deeper() {
    // Three times as much as it takes without optimisation.
    with_stack(1 << 20, || {
        let mut slot = vec![0_u128; 4096];
        let slot: &mut [u8] = bytemuck::cast_slice_mut(&mut slot);
        let deepest = chain(MAX_DEPTH as u64);
        let length = deepest.encode(slot).unwrap();
        assert_eq!(Chain::decode(&slot[..length]), Ok(deepest));
        let deeper = chain(MAX_DEPTH as u64 + 1);
        let length = deeper.encode(slot).unwrap();
        assert_eq!(Chain::decode(&slot[..length]), Err(CodecError::Invalid));
        assert!(Chain::access(&slot[..length]).is_err());

        let mut slot = vec![0_u128; 1 << 14];
        let slot: &mut [u8] = bytemuck::cast_slice_mut(&mut slot);
        let leaf = Tree {
            payload: [7; 32],
            children: Vec::new(),
        };
        // An empty vector is one level too.
        let tree = (1..MAX_DEPTH).fold(leaf, |tree, level| Tree {
            payload: [level as u64; 32],
            children: vec![tree],
        });
        let length = tree.encode(slot).unwrap();
        assert_eq!(Tree::decode(&slot[..length]), Ok(tree));
    });
}

#[test]
fn a_deeply_nested_archive_is_an_error_of_that_message_alone() {
    let deep = chain_bytes(40_000);
    let also_deep = deep.clone();
    let nested = KernelRegistration::new("nested")
        .message::<Chain>()
        .largest_message(1 << 20)
        .queue_capacity(4)
        .cpu_handler(move |request, context| {
            if request.is::<Chain>() {
                // The kernel's own stack is no larger.
                request.access::<Chain>()?;
                return context.reply(&chain(1));
            }
            context.reply_as::<Chain>(&also_deep)?;
            context.reply(&chain(3))
        });
    let runtime = runtime(nested);
    let kernel = active(&runtime, "nested");
    // A caller with as much stack as any thread has.
    with_stack(2 << 20, || {
        let corrupt = MessageError::Corrupt;
        kernel.send_bytes(b"x").unwrap();
        assert_eq!(
            kernel.recv_timeout::<Chain>(LONG),
            Err(RecvTimeoutError::Message(corrupt))
        );
        assert_eq!(kernel.recv_timeout::<Chain>(LONG), Ok(chain(3)));

        let (mut sender, mut receiver) = kernel.split::<Chain, Chain>().unwrap();
        sender.try_send_bytes(b"x").unwrap();
        let received = receiver.recv_ref_timeout(LONG).unwrap();
        assert!(matches!(received.access(), Err(MessageError::Corrupt)));
        drop(received);
        assert_eq!(receiver.recv_timeout(LONG), Ok(chain(3)));
        // A request is bytes of another as well.
        let slot = sender.reserve().map(|mut slot| {
            slot.body_mut()[..deep.len()].copy_from_slice(&deep);
            slot.commit(deep.len())
        });
        assert_eq!(slot, Ok(Ok(())));
        let Err(RecvTimeoutError::Message(MessageError::Handler(error))) =
            receiver.recv_timeout(LONG)
        else {
            panic!("a deep request was taken");
        };
        assert_eq!(error.code, HandlerError::BAD_REQUEST);
        drop((sender, receiver));

        let mut client = kernel.client::<Chain, Chain>().unwrap();
        client.try_send_bytes(b"x").unwrap();
        assert_eq!(
            client.recv_timeout(LONG),
            Err(RecvTimeoutError::Message(corrupt))
        );
        assert_eq!(client.recv_timeout(LONG), Ok(chain(3)));
        assert_eq!(client.call(&chain(2), LONG), Ok(chain(1)));
    });
    assert_eq!(kernel.status().failure, None);
}

/// Says of itself that it is longer than its slot.
#[derive(Archive, Serialize, Deserialize, Debug)]
struct Boastful {
    excess: u64,
}

impl RingMessage for Boastful {
    const TYPE_ID: u64 = ringkernel::message::type_id_of(Self::NAME);
    const NAME: &'static str = "test.Boastful.v1";

    fn encode(&self, slot: &mut [u8]) -> Result<usize, CodecError> {
        Ok(slot.len().saturating_add(self.excess as usize))
    }

    fn access(_: &[u8]) -> Result<&Self::Archived, CodecError> {
        Err(CodecError::Invalid)
    }

    fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        Ok(Self {
            excess: bytes.len() as u64,
        })
    }
}

fn is_too_large(rejection: Rejection) -> bool {
    matches!(rejection, Rejection::TooLarge { .. })
}

#[track_caller]
fn check_refused(outcome: Result<(), TrySendError>) {
    assert!(
        matches!(outcome, Err(TrySendError::Rejected(rejection)) if is_too_large(rejection)),
        "{outcome:?}"
    );
}

#[track_caller]
fn check_refused_in_time<T: std::fmt::Debug>(outcome: Result<T, SendTimeoutError>) {
    assert!(
        matches!(outcome, Err(SendTimeoutError::Rejected(rejection)) if is_too_large(rejection)),
        "{outcome:?}"
    );
}

#[track_caller]
fn check_call_refused<T: std::fmt::Debug>(outcome: Result<T, CallError>) {
    assert!(
        matches!(outcome, Err(CallError::Rejected(rejection)) if is_too_large(rejection)),
        "{outcome:?}"
    );
}

#[test]
fn a_length_beyond_the_slot_is_refused_by_every_sender() {
    let lengths = [1, 15, 16, 1 << 24, u64::MAX];
    let length = KernelRegistration::new("length")
        .message::<Boastful>()
        .largest_message(100)
        .queue_capacity(4)
        .cpu_handler(move |request, context| {
            let excess = request.payload().first().copied().unwrap_or(0);
            if excess < 5 {
                let excess = lengths[usize::from(excess)];
                return context.reply(&Boastful { excess });
            }
            context.reply_bytes(request.payload())
        });
    let runtime = runtime(length);
    let kernel = active(&runtime, "length");
    let mut reply = [0; 128];
    for (index, excess) in lengths.into_iter().enumerate() {
        let message = Boastful { excess };
        check_refused(kernel.try_send(&message));
        check_refused_in_time(kernel.send(&message));
        check_refused_in_time(kernel.send_with(
            &message,
            &SendOptions {
                timestamp: true,
                ..SendOptions::default()
            },
            LONG,
        ));
        check_call_refused(kernel.call::<_, Boastful>(&message, LONG));
        // A handler's reply.
        let Err(CallError::Message(MessageError::Handler(error))) =
            kernel.call_bytes(&[index as u8], &mut reply, LONG)
        else {
            panic!("a reply longer than its slot was taken");
        };
        assert_eq!(error.code, HandlerError::REPLY_TOO_LARGE);

        let (mut sender, mut receiver) = kernel.split::<Boastful, Boastful>().unwrap();
        check_refused(sender.try_send(&message));
        check_refused(sender.try_send_with(&message, &SendOptions::default()));
        check_refused_in_time(sender.send(&message));
        check_refused(sender.send_batch(&[Boastful { excess }]).map(drop));
        let slot = sender.reserve().unwrap();
        let longer = 112_usize.saturating_add(excess as usize);
        check_refused(slot.commit(longer));
        assert!(matches!(receiver.try_recv(), Err(TryRecvError::Empty)));
        drop((sender, receiver));

        // Once directly, and once through their lanes.
        for newest_only in [false, true] {
            let mut client = kernel.client::<Boastful, Boastful>().unwrap();
            let mut second = kernel.client::<Boastful, Boastful>().unwrap();
            check_refused(client.try_send(&message));
            check_refused_in_time(client.send(&message));
            check_call_refused(client.call(&message, LONG));
            if newest_only {
                let mut latest = kernel.latest::<Boastful, Boastful>().unwrap();
                check_refused(latest.publish(&message));
                assert!(matches!(latest.newest(), Err(TryRecvError::Empty)));
                check_refused(second.try_send(&message));
                check_refused(client.try_send(&message));
            }
            let length = client.call_bytes(b"good", &mut reply, LONG).unwrap();
            assert_eq!(&reply[..length], b"good");
            assert!(matches!(client.try_recv(), Err(TryRecvError::Empty)));
            assert!(matches!(second.try_recv(), Err(TryRecvError::Empty)));
        }
    }
    let metrics = kernel.metrics();
    // Of each round the request for a bad reply, and two good ones.
    assert_eq!(metrics.accepted, 3 * lengths.len() as u64);
}

#[test]
fn a_length_beyond_the_message_size_is_refused_by_a_publisher() {
    let runtime = RingKernelRuntime::builder().build().unwrap();
    let options = TopicOptions {
        message_size: Some(40),
        ..TopicOptions::default()
    };
    let topic = runtime.topic::<Boastful>("lengths", options).unwrap();
    let mut publisher = topic.publisher().unwrap();
    let mut subscriber = topic.subscribe(SubscriberOptions::default()).unwrap();
    for excess in [1, 8, 1 << 24, u64::MAX] {
        check_refused(publisher.publish(&Boastful { excess }));
        check_refused_in_time(publisher.publish_timeout(&Boastful { excess }, LONG));
    }
    assert!(matches!(subscriber.try_recv(), Err(TryRecvError::Empty)));
}

#[test]
fn a_deadline_of_zero_has_passed() {
    let runtime = RingKernelRuntime::builder()
        .backend(BackendType::Cpu)
        .build()
        .unwrap();
    let options = LaunchOptions {
        extended: true,
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch("echo", 1, 1, options).unwrap();
    kernel.activate().unwrap();
    let deadline = SendOptions {
        deadline_ns: Some(0),
        ..SendOptions::default()
    };
    let none = SendOptions {
        timestamp: true,
        ..SendOptions::default()
    };
    let mut reply = [0; 48];
    // What follows an expired message says that it is gone.
    kernel.send_bytes_with(b"late", &deadline, LONG).unwrap();
    kernel.send_bytes_with(b"first", &none, LONG).unwrap();
    let length = kernel.recv_bytes_timeout(&mut reply, LONG).unwrap();
    assert_eq!(&reply[..length], b"first");

    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    sender.try_send_bytes_with(b"late", &deadline).unwrap();
    sender.try_send_bytes_with(b"second", &none).unwrap();
    let length = receiver.recv_bytes_timeout(&mut reply, LONG).unwrap();
    assert_eq!(&reply[..length], b"second");
    drop((sender, receiver));

    let mut client = kernel.client_bytes().unwrap();
    client.try_send_bytes_with(b"late", &deadline).unwrap();
    client.try_send_bytes_with(b"third", &none).unwrap();
    let length = client.recv_bytes_timeout(&mut reply, LONG).unwrap();
    assert_eq!(&reply[..length], b"third");
    assert_eq!(kernel.metrics().dead_letters.expired, 3);
}

/// Types as they are in an order book or a list of names.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
struct Level {
    price: u64,
    size: Option<u32>,
}

#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
struct Book {
    levels: Vec<Level>,
    names: Vec<Vec<String>>,
    counts: HashMap<u16, u8>,
}
ringkernel::ring_message!(Book, "test.Book.v1");

/// A book that takes a few times as many bytes as `entries`.
fn book(entries: usize) -> Book {
    Book {
        levels: (0..entries)
            .map(|index| Level {
                price: index as u64,
                size: (index % 3 == 0).then_some(7),
            })
            .collect(),
        names: (0..entries / 16)
            .map(|index| vec![format!("a name that is not short {index}"); 8])
            .collect(),
        counts: (0..entries)
            .map(|index| (index as u16, index as u8))
            .collect(),
    }
}

fn books(message_size: usize) -> KernelRegistration {
    KernelRegistration::new("books")
        .message::<Book>()
        .largest_message(message_size)
        .queue_capacity(4)
        .cpu_handler(|request, context| {
            let archived = request.access::<Book>()?;
            let book = rkyv::deserialize::<Book, rkyv::rancor::Failure>(archived)
                .map_err(|_| HandlerError::from("not a book"))?;
            context.reply(&book)
        })
}

#[test]
fn whatever_fits_its_slot_is_sent() {
    // Small slots, whose senders have a kilobyte on the stack, and large ones.
    for entries in [16, 60, 300, 4000] {
        let book = book(entries);
        let archive = rkyv::to_bytes::<rkyv::rancor::Error>(&book).unwrap();
        // The archive fills its slot but for less than a line.
        let runtime = runtime(books(archive.len()));
        let kernel = active(&runtime, "books");
        assert_eq!(kernel.call(&book, LONG), Ok(book.clone()), "{entries}");
        kernel.send(&book).unwrap();
        assert_eq!(kernel.recv_timeout(LONG), Ok(book.clone()));
        {
            let (mut sender, mut receiver) = kernel.split::<Book, Book>().unwrap();
            sender.send(&book).unwrap();
            assert_eq!(receiver.recv_timeout(LONG), Ok(book.clone()));
            let sent = sender.send_batch(&[book.clone(), book.clone()]);
            assert_eq!(sent, Ok(2));
            for _ in 0..2 {
                assert_eq!(receiver.recv_timeout(LONG), Ok(book.clone()));
            }
        }
        {
            let mut client = kernel.client::<Book, Book>().unwrap();
            assert_eq!(client.call(&book, LONG), Ok(book.clone()));
            let _second = kernel.client::<Book, Book>().unwrap();
            client.send(&book).unwrap();
            assert_eq!(client.recv_timeout(LONG), Ok(book.clone()));
            let mut latest = kernel.latest::<Book, Book>().unwrap();
            latest.publish(&book).unwrap();
            assert_eq!(latest.newest_timeout(LONG), Ok(book.clone()));
        }
        let options = TopicOptions {
            message_size: Some(archive.len()),
            ..TopicOptions::default()
        };
        let topic = runtime.topic::<Book>("books", options).unwrap();
        let mut publisher = topic.publisher().unwrap();
        let mut subscriber = topic.subscribe(SubscriberOptions::default()).unwrap();
        publisher.publish(&book).unwrap();
        assert_eq!(subscriber.recv_timeout(LONG), Ok(book.clone()));
        // One line more is too large, and that is what is said.
        let mut larger = book;
        larger.names.push(vec!["x".repeat(256)]);
        check_refused(kernel.try_send(&larger));
        check_refused(publisher.publish(&larger));
    }
}

/// A text that is not UTF-8, which its serialiser refuses.
#[derive(Archive, Serialize, Deserialize, Debug)]
struct Named {
    #[rkyv(with = rkyv::with::AsString)]
    path: std::path::PathBuf,
}
ringkernel::ring_message!(Named, "test.Named.v1");

#[cfg(unix)]
#[test]
fn what_its_own_serialiser_refuses_is_not_called_too_large() {
    use std::os::unix::ffi::OsStringExt;
    let named = KernelRegistration::new("named")
        .message::<Named>()
        .largest_message(1000)
        .cpu_handler(|_, context| {
            context.reply(&Named {
                path: std::ffi::OsString::from_vec(vec![0xff]).into(),
            })
        });
    let runtime = runtime(named);
    let kernel = active(&runtime, "named");
    let refused = Named {
        path: std::ffi::OsString::from_vec(vec![0xff]).into(),
    };
    assert_eq!(
        kernel.try_send(&refused),
        Err(TrySendError::Rejected(Rejection::NotEncodable))
    );
    let Err(CallError::Message(MessageError::Handler(error))) =
        kernel.call::<_, Named>(&Named { path: "x".into() }, LONG)
    else {
        panic!("a reply that cannot be encoded was sent");
    };
    assert_eq!(error.code, HandlerError::NOT_ENCODABLE);
}
