//! What machine a number was measured on. Shared by the benchmark and the examples.

use std::fs;

use serde_json::{Value, json};

/// Whatever of this machine is known to move latencies.
pub fn describe() -> Value {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        cpuinfo
            .lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map_or("unknown", |(_, value)| value.trim())
            .to_owned()
    };
    let read = |path: &str| {
        fs::read_to_string(path)
            .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
    };
    json!({
        "cpu": field("model name"),
        "cores": ringkernel::thread::affinity::online_cores().len(),
        "virtual_machine": cpuinfo.contains(" hypervisor"),
        "isolated_cores": read("/sys/devices/system/cpu/isolated"),
        "frequency_governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "ringkernel": env!("CARGO_PKG_VERSION"),
        "optimised": !cfg!(debug_assertions),
    })
}

/// One line for people.
pub fn one_line(machine: &Value) -> String {
    let text = |key: &str| machine[key].as_str().unwrap_or("unknown").to_owned();
    format!(
        "{} ({} cores{}), {} {}, governor {}, isolated cores: {}",
        text("cpu"),
        machine["cores"],
        if machine["virtual_machine"] == true {
            ", virtual machine"
        } else {
            ""
        },
        text("os"),
        text("kernel"),
        text("frequency_governor"),
        match text("isolated_cores").as_str() {
            "" => "none".to_owned(),
            cores => cores.to_owned(),
        }
    )
}
