//! Handlers in GLSL, compiled at launch.

use glslang::{
    Compiler, CompilerOptions, GlslProfile, ShaderInput, ShaderSource, ShaderStage, SourceLanguage,
    SpirvVersion, Target, VulkanVersion,
};

use crate::error::Error;
use crate::kernel::ShaderCode;

/// A handler's module, for messages that are traced or not.
pub(super) fn compile(kernel: &str, handler: &str, traced: bool) -> Result<Vec<u32>, Error> {
    let failed = |log: String| Error::Compile {
        kernel: kernel.to_owned(),
        log: log.trim().to_owned(),
    };
    // Extensions must be asked for before anything else.
    let uses: String = ["RK_USE_U64", "RK_USE_F64", "RK_USE_TIME"]
        .into_iter()
        .filter(|name| handler.contains(name))
        .chain(traced.then_some("RK_TRACES"))
        .map(|name| format!("#define {name}\n"))
        .collect();
    // Lines are counted anew where the handler begins.
    let text = format!(
        "#version 450\n{uses}{}\n#line 1\n{handler}\n",
        ShaderCode::PRELUDE
    );
    let compiler =
        Compiler::acquire().ok_or_else(|| failed("the compiler does not start".into()))?;
    let options = CompilerOptions {
        source_language: SourceLanguage::GLSL,
        target: Target::Vulkan {
            version: VulkanVersion::Vulkan1_1,
            spirv_version: SpirvVersion::SPIRV1_3,
        },
        version_profile: Some((450, GlslProfile::None)),
        ..CompilerOptions::default()
    };
    let source = ShaderSource::from(text);
    let input = ShaderInput::new(&source, ShaderStage::Compute, &options, None, None)
        .map_err(|error| failed(error.to_string()))?;
    let shader = compiler
        .create_shader(input)
        .map_err(|error| failed(error.to_string()))?;
    shader.compile().map_err(|error| failed(error.to_string()))
}
