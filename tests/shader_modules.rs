//! What must hold for the committed SPIR-V modules, whatever compiler built them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const OP_DECORATE: u32 = 71;
const OP_MEMBER_DECORATE: u32 = 72;
/// Words before the first instruction (SPIR-V specification, 2.3, "Physical Layout").
const HEADER_WORDS: usize = 5;

/// The instructions of a module: opcode and operands.
fn instructions(bytes: &[u8]) -> Vec<(u32, Vec<u32>)> {
    let words: Vec<u32> = bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect();
    let mut rest = &words[HEADER_WORDS..];
    let mut found = Vec::new();
    while let Some(&first) = rest.first() {
        let length = (first >> 16) as usize;
        assert!(
            (1..=rest.len()).contains(&length),
            "an instruction of {length} words"
        );
        found.push((first & 0xffff, rest[1..length].to_vec()));
        rest = &rest[length..];
    }
    found
}

/// Validators since 1.4.309 of the Vulkan SDK refuse a second decoration of the same sort (SPIR-V
/// specification, 2.16.1, "Universal Validation Rules"); older ones accept it.
#[test]
fn no_committed_module_decorates_anything_twice_in_the_same_way() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut modules = 0;
    for folder in ["shaders", "tests/shaders", "benches/shaders"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "spv") {
                continue;
            }
            modules += 1;
            let mut seen = BTreeSet::new();
            for (opcode, operands) in instructions(&fs::read(&path).unwrap()) {
                if matches!(opcode, OP_DECORATE | OP_MEMBER_DECORATE) {
                    assert!(
                        seen.insert((opcode, operands.clone())),
                        "{}: {operands:?} twice",
                        path.display()
                    );
                }
            }
            assert!(!seen.is_empty(), "{}: no decorations", path.display());
        }
    }
    assert!(modules > 20, "{modules} modules");
}
