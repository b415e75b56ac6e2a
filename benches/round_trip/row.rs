//! One line of a table, for people and for the report.

use hdrhistogram::Histogram;
use serde_json::{Value, json};

pub fn head() {
    println!(
        "{:<28}{:>8}{:>9}{:>9}{:>9}{:>9}{:>11}{:>9}",
        "path", "backend", "p50", "p90", "p99", "p99.9", "max", "x floor"
    );
}

/// Prints a histogram's line, beside the floor's median if there is one (not 0).
pub fn print(name: &str, backend: &str, histogram: &Histogram<u64>, floor: u64) -> Value {
    let at = |quantile| histogram.value_at_quantile(quantile);
    let ratio = match floor {
        0 => String::new(),
        floor => format!("{:.2}", at(0.5) as f64 / floor as f64),
    };
    println!(
        "{name:<28}{backend:>8}{:>9}{:>9}{:>9}{:>9}{:>11}{ratio:>9}",
        at(0.5),
        at(0.9),
        at(0.99),
        at(0.999),
        histogram.max(),
    );
    json!({
        "path": name,
        "backend": backend,
        "messages": histogram.len(),
        "p50_ns": at(0.5),
        "p90_ns": at(0.9),
        "p99_ns": at(0.99),
        "p99_9_ns": at(0.999),
        "max_ns": histogram.max(),
    })
}
