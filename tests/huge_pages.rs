//! `RuntimeConfig::huge_pages`, as the kernel sees it. A process of its own: nothing else in it asks for huge pages.
#![cfg(target_os = "linux")]

use ringkernel::{ClientOptions, LaunchOptions, RingKernelRuntime, RuntimeConfig};

/// KiB of this process that are marked for huge pages.
fn advised() -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut size, mut sum) = (0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Size:") => size = words.next().unwrap().parse().unwrap(),
            Some("VmFlags:") if words.any(|flag| flag == "hg") => sum += size,
            _ => {}
        }
    }
    sum
}

#[test]
fn rings_of_kernels_and_lanes_lie_in_huge_pages_on_request() {
    if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage/enabled").exists() {
        println!("skipped: this kernel has no transparent huge pages");
        return;
    }
    let before = advised();
    for huge_pages in [false, true] {
        let runtime = RingKernelRuntime::builder()
            .config(RuntimeConfig {
                huge_pages,
                ..RuntimeConfig::default()
            })
            .build()
            .unwrap();
        // 64 bytes a slot: 4 MiB a ring.
        let slots = 1 << 16;
        let options = LaunchOptions {
            queue_capacity: Some(slots),
            ..LaunchOptions::default()
        };
        let kernel = runtime.launch("echo", 1, 1, options).unwrap();
        let with_kernel = advised();
        let options = ClientOptions {
            capacity: Some(slots),
            ..ClientOptions::default()
        };
        let _client = kernel.client_bytes_with(options).unwrap();
        let with_client = advised();
        println!("huge_pages {huge_pages}: {before}, {with_kernel}, {with_client} KiB");
        if huge_pages {
            assert!(with_kernel >= before + 8 * 1024);
            assert!(with_client >= with_kernel + 16 * 1024);
        } else {
            assert_eq!(with_client, before);
        }
    }
}
