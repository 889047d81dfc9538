//! A model continues a text: `cargo run --release -p flashinfer-serve --example ten_lines`.

use flashinfer_serve::{Llm, SamplingParams};

fn main() -> flashinfer_serve::Result<()> {
    let llm = Llm::open("smollm2")?;
    let params = SamplingParams { max_tokens: Some(32), ..SamplingParams::default() };
    for answer in llm.generate("The capital of France is", &params)? {
        println!("{}", answer.text);
    }
    Ok(())
}
