//! What is checked of a module before a driver sees it: drivers may crash on what is not SPIR-V.

use super::physical::Features;

/// The layout that the prelude in `shaders/ringkernel.glsl` declares, as the default of specialization constant 31.
pub(super) const LAYOUT_VERSION: u32 = 3;

const LAYOUT_CONSTANT: u32 = 31;

// SPIR-V specification 1.6, sections 2.3 (header), 3.3 (execution models), 3.20 (decorations), 3.32 (instructions).
const MAGIC: u32 = 0x0723_0203;
const HEADER_WORDS: usize = 5;
const OP_ENTRY_POINT: u32 = 15;
const OP_CAPABILITY: u32 = 17;
const CAPABILITY_FLOAT64: u32 = 10;
const CAPABILITY_INT64: u32 = 11;
const CAPABILITY_SHADER_CLOCK: u32 = 5055;
const OP_SPEC_CONSTANT: u32 = 50;
const OP_DECORATE: u32 = 71;
const DECORATION_SPEC_ID: u32 = 1;
const MODEL_GL_COMPUTE: u32 = 5;

/// SPIR-V 1.3 is what Vulkan 1.1 takes.
const NEWEST_VERSION: u32 = 0x0001_0300;

/// The module's words, if it can be given to a driver; what is wrong with it otherwise.
pub(super) fn check(bytes: &[u8]) -> Result<Vec<u32>, String> {
    if !bytes.len().is_multiple_of(4) {
        return Err(format!("{} bytes are not whole words", bytes.len()));
    }
    let words: Vec<u32> = bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect();
    let Some((&[magic, version, _generator, bound, schema], body)) =
        words.split_first_chunk::<HEADER_WORDS>()
    else {
        return Err("it is shorter than a SPIR-V header".into());
    };
    if magic != MAGIC {
        return Err(format!(
            "it begins with {magic:#010x}, not with SPIR-V's {MAGIC:#010x}"
        ));
    }
    if version > NEWEST_VERSION {
        return Err(format!(
            "it is SPIR-V {}.{}; at most 1.3 is taken (--target-env vulkan1.1)",
            version >> 16,
            (version >> 8) & 0xff
        ));
    }
    if bound == 0 || schema != 0 {
        return Err("its header is damaged".into());
    }
    let (mut has_entry, mut layout_id, mut layout) = (false, None, None);
    let mut rest = body;
    while let [first, ..] = rest {
        let (length, opcode) = ((first >> 16) as usize, first & 0xffff);
        if length == 0 || length > rest.len() {
            return Err("an instruction has a length that cannot be".into());
        }
        let (instruction, after) = rest.split_at(length);
        match (opcode, instruction) {
            (OP_ENTRY_POINT, [_, MODEL_GL_COMPUTE, _, name @ ..]) => {
                has_entry |= name.first() == Some(&u32::from_le_bytes(*b"main"))
                    && name.get(1).is_some_and(|word| word & 0xff == 0);
            }
            (OP_DECORATE, [_, target, DECORATION_SPEC_ID, LAYOUT_CONSTANT]) => {
                layout_id = Some(*target);
            }
            (OP_SPEC_CONSTANT, [_, _, result, value]) if layout_id == Some(*result) => {
                layout = Some(*value);
            }
            _ => {}
        }
        rest = after;
    }
    if !has_entry {
        return Err("it has no compute entry point `main`".into());
    }
    match layout {
        None => Err("it declares no layout: it was not built with shaders/ringkernel.glsl".into()),
        Some(LAYOUT_VERSION) => Ok(words),
        Some(found) => Err(format!(
            "it was built for layout {found}; this version has layout {LAYOUT_VERSION}"
        )),
    }
}

/// What a module needs that the device does not have, if anything.
pub(super) fn lacks(words: &[u32], features: &Features) -> Option<&'static str> {
    capabilities(words).find_map(|capability| match capability {
        CAPABILITY_INT64 if !features.int64 => Some("64-bit integers"),
        CAPABILITY_FLOAT64 if !features.float64 => Some("64-bit floats"),
        CAPABILITY_SHADER_CLOCK if !features.device_clock => Some("clock that shaders can read"),
        _ => None,
    })
}

/// Whether a module reads a clock.
pub(super) fn reads_clock(words: &[u32]) -> bool {
    capabilities(words).any(|capability| capability == CAPABILITY_SHADER_CLOCK)
}

/// What a module declares to need. Capabilities come before everything else.
fn capabilities(words: &[u32]) -> impl Iterator<Item = u32> {
    let mut rest = words.get(HEADER_WORDS..).unwrap_or_default();
    std::iter::from_fn(move || match *rest {
        [first, capability, ..] if first & 0xffff == OP_CAPABILITY => {
            rest = rest
                .get((first >> 16).max(1) as usize..)
                .unwrap_or_default();
            Some(capability)
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    static ECHO: &[u8] = include_bytes!("../../../shaders/echo.spv");

    fn with_word(index: usize, value: u32) -> Vec<u8> {
        let mut bytes = ECHO.to_vec();
        bytes[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    fn refusal(bytes: &[u8]) -> String {
        check(bytes).unwrap_err()
    }

    #[test]
    fn the_built_in_modules_pass() {
        for module in [
            ECHO,
            include_bytes!("../../../shaders/sink.spv"),
            include_bytes!("../../../shaders/saxpy.spv"),
        ] {
            check(module).unwrap();
        }
    }

    #[test]
    fn what_is_no_module_of_ours_is_refused_with_its_reason() {
        assert!(refusal(&ECHO[..ECHO.len() - 1]).contains("whole words"));
        assert!(refusal(&[]).contains("header"));
        assert!(refusal(&with_word(0, 0)).contains("begins with"));
        assert!(refusal(&with_word(1, 0x0001_0500)).contains("1.5"));
        assert!(refusal(&with_word(3, 0)).contains("damaged"));
        assert!(refusal(&with_word(5, 0)).contains("length"));
        assert!(refusal(&ECHO[..20]).contains("entry point"));
        // Another entry point name, another layout, none.
        let words: Vec<u32> = check(ECHO).unwrap();
        let main = u32::from_le_bytes(*b"main");
        let name = words.iter().position(|word| *word == main).unwrap();
        assert!(refusal(&with_word(name, main + 1)).contains("entry point"));
        let spec = words
            .windows(4)
            .position(|w| w[0] == (4 << 16 | OP_DECORATE) && w[2..] == [1, LAYOUT_CONSTANT])
            .unwrap();
        let id = words[spec + 1];
        assert!(refusal(&with_word(spec + 3, 30)).contains("declares no layout"));
        let constant = words
            .windows(4)
            .position(|w| w[0] == (4 << 16 | OP_SPEC_CONSTANT) && w[2] == id)
            .unwrap();
        assert!(refusal(&with_word(constant + 3, 1)).contains("layout 1"));
    }

    #[test]
    fn what_a_device_lacks_is_told() {
        let words = check(include_bytes!("../../../tests/shaders/numbers.spv")).unwrap();
        let features = |int64, float64| Features {
            int64,
            float64,
            device_clock: false,
            subgroup_clock: true,
        };
        assert_eq!(lacks(&words, &features(true, true)), None);
        assert_eq!(
            lacks(&words, &features(false, true)),
            Some("64-bit integers")
        );
        assert_eq!(lacks(&words, &features(true, false)), Some("64-bit floats"));
        let plain = check(ECHO).unwrap();
        assert_eq!(lacks(&plain, &features(false, false)), None);
        assert!(!reads_clock(&plain) && !reads_clock(&words));
        let traced = check(include_bytes!("../../../shaders/echo.traced.spv")).unwrap();
        assert!(reads_clock(&traced));
        let with_clock = Features {
            device_clock: true,
            ..features(false, false)
        };
        assert_eq!(lacks(&traced, &with_clock), None);
        assert_eq!(
            lacks(&traced, &features(true, true)),
            Some("clock that shaders can read")
        );
    }

    #[test]
    fn no_truncation_and_no_flipped_word_panics() {
        for length in (0..ECHO.len()).step_by(4) {
            let _ = check(&ECHO[..length]);
        }
        for index in 0..ECHO.len() / 4 {
            let _ = check(&with_word(index, u32::MAX));
            let mut words = check(ECHO).unwrap();
            words[index] = 0;
            let features = Features {
                int64: false,
                float64: false,
                device_clock: false,
                subgroup_clock: false,
            };
            let _ = lacks(&words, &features);
        }
    }
}
