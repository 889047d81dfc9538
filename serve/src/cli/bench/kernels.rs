//! What the kernels of a decode step cost.

use flashinfer_rs::kv::{Batch, PageAllocator, Sequence};

use super::{super::out::say, table};
use crate::{
    Result,
    backend::{
        Output, Step, StepToken,
        gpu::{Breakdown, Gpu},
    },
};

/// Prints a table for a step of so many requests, each with so many tokens before it.
pub fn table(gpu: &mut Gpu, pool: &PageAllocator, requests: usize, context: usize) -> Result<()> {
    let mut batch = Batch::new(pool);
    for _ in 0..requests {
        batch.push(Sequence::new(pool))?;
    }
    // Nobody looks at what is said, so the context is not computed.
    batch.append(vec![context; requests])?;
    batch.append(vec![1; requests])?;
    let outputs: Vec<_> = (0..requests).map(Output::greedy).collect();
    let tokens = vec![StepToken::Known(0); requests];
    let Breakdown { microseconds, overlapping, kernels } =
        gpu.break_down(&Step { batch: &batch, tokens: &tokens, outputs: &outputs })?;
    let launches: usize = kernels.iter().map(|kernel| kernel.launches).sum();
    say!("");
    say!(
        "{requests} requests: {microseconds:.1} µs, {launches} kernels, of which {overlapping} may begin early"
    );
    say!("saved: by how much the step is shorter without the kernels of a row");
    table::head(&["kernel", "blocks × threads", "launches", "saved µs", "each µs", "of the step"])?;
    let mut all = 0.0;
    for kernel in &kernels {
        let saved = kernel.microseconds;
        all += saved;
        say!(
            "| {} | {} × {} | {} | {saved:.1} | {:.2} | {:.1} % |",
            short(&kernel.name),
            kernel.blocks,
            kernel.threads,
            kernel.launches,
            saved / kernel.launches as f64,
            1e2 * saved / microseconds,
        );
    }
    say!("| what is hidden behind others, or waited for | | | {:.1} | | |", microseconds - all);
    Ok(())
}

/// The last part of a name as compilers of C++ write it, or the name as it is.
fn short(name: &str) -> &str {
    let Some(mut rest) = name.strip_prefix("_Z") else { return name };
    rest = rest.strip_prefix('N').unwrap_or(rest);
    let mut last = name;
    loop {
        let digits = rest.find(|next: char| !next.is_ascii_digit()).unwrap_or(rest.len());
        let part = rest[..digits].parse().ok().and_then(|len: usize| rest[digits..].split_at_checked(len));
        let Some((part, further)) = part else { return last };
        (last, rest) = (part, further);
    }
}

#[cfg(test)]
mod tests {
    use super::short;

    #[test]
    fn names_are_short() {
        assert_eq!(
            short("_ZN10flashinfer4norm21FusedAddRMSNormKernelILj8E6__halfEEvPT0_"),
            "FusedAddRMSNormKernel"
        );
        assert_eq!(short("_Z6kernelPf"), "kernel");
        assert_eq!(short("argmax_f32"), "argmax_f32");
        assert_eq!(short("_Z99short"), "_Z99short");
        assert_eq!(short("_Z"), "_Z");
    }
}
