//! GDN prefill on the second of two GPUs. Alone in its process, because
//! FlashInfer's launcher prepares a kernel on the first device that uses it only.
#![cfg(feature = "cudarc")]

mod common;

use common::{
    gdn::{Case, Problem, Results, watched},
    say,
};
use cudarc::driver::result::ctx;
use flashinfer_rs::{
    FlashInferError,
    gdn::{GdnInput, GdnOptions, GdnOutput, GdnWorkspace, gdn_prefill},
};
use half::f16;

/// While the first GPU is current: the kernel runs where its tensors are, and
/// the first GPU is current again afterwards.
#[test]
fn the_current_device_is_set_and_put_back() {
    watched(|first, rng| {
        if first.runtime.device_count().unwrap() < 2 {
            return say("skipped: there is one GPU only");
        }
        let second = &first.on_another();
        let case = Case { alpha: false, beta: false, ..Case::new(&[70, 5], [2, 1, 1]) };
        let problem = Problem::<f16>::random(second, rng, &case);
        let mut results = Results::<f16>::poisoned(second, &case);
        let (workspace, table) = (GdnWorkspace::new(&second.stream).unwrap(), case.table(second));
        {
            let (q, k, v) = (problem.q.device_view(), problem.k.device_view(), problem.v.device_view());
            let (mut output, mut state) = (results.output.device_view_mut(), results.state.device_view_mut());
            let input = GdnInput::new(q, k, v);
            let mut out = GdnOutput { output: output.reborrow(), state: state.reborrow() };
            first.cuda.context().bind_to_thread().unwrap();
            gdn_prefill(&workspace, &mut out, &input, &table, &GdnOptions::default()).unwrap();
            assert_eq!(ctx::get_current().unwrap(), Some(first.cuda.context().cu_ctx()));
        }
        problem.verify("the second GPU", &results, &problem.expected());

        // The same kernel on the first GPU is right, or an error.
        let problem = Problem::<f16>::random(first, rng, &case);
        let mut results = Results::<f16>::poisoned(first, &case);
        let (workspace, table) = (GdnWorkspace::new(&first.stream).unwrap(), case.table(first));
        match problem.run(&workspace, &table, problem.start(), &mut results) {
            Ok(()) => {
                problem.verify("then the first", &results, &problem.expected());
                say("a second device of one process works");
            }
            Err(error @ FlashInferError::TvmFfiCall { .. }) => {
                say(&format!("a second device of one process is refused: {error}"));
                results.output.assert_untouched();
            }
            Err(error) => panic!("{error}"),
        }
    });
}
