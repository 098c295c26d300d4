#include "cpu/step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/features.h"
#include "cpu/floats.h"
#include "cpu/step_loops.h"

namespace codegemm::cpu {

namespace {

constexpr int64_t kColumns = 2048;        // of a gate or of logits that are capped, a task
constexpr int64_t kScores = 4096;         // that a task looks through for the largest
constexpr int64_t kDenseBytes = 1 << 16;  // of a dense matrix a task
constexpr int64_t kMaxShares = 32;        // of a sequence's keys

int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

int64_t ceil(int64_t count, int64_t each) { return (count + each - 1) / each; }

class EmbedTokens : public Phases {
 public:
  explicit EmbedTokens(const Embed& op) : op_(op) {}
  int64_t phases() const override { return 1; }
  int64_t tasks(int64_t) const override { return op_.rows; }
  void run(int64_t, int64_t row) const override {
    const int64_t bytes = op_.width * bytes_of(op_.dtype);
    const char* from = static_cast<const char*>(op_.table) + op_.tokens[row] * bytes;
    std::copy_n(from, bytes, static_cast<char*>(op_.y) + row * bytes);
  }

 private:
  const Embed op_;
};

class AddAndNorm : public Phases {
 public:
  explicit AddAndNorm(const AddNorm& op) : op_(op) {}
  int64_t phases() const override { return 1; }
  int64_t tasks(int64_t) const override { return op_.rows; }
  void run(int64_t, int64_t row) const override { step_loops().add_norm(op_, row); }

 private:
  const AddNorm op_;
};

class DenseProduct : public Phases {
 public:
  explicit DenseProduct(const Dense& op)
      : op_(op),
        rows_(std::max<int64_t>(4, kDenseBytes / (op.in_features * bytes_of(op.dtype)) / 4 * 4)),
        x_(size_t(op.rows * op.in_features)) {}
  int64_t phases() const override { return 2; }
  int64_t tasks(int64_t phase) const override { return phase == 0 ? op_.rows : ceil(op_.out_features, rows_); }
  void run(int64_t phase, int64_t task) const override {
    if (phase == 0) {
      const char* x = static_cast<const char*>(op_.x.data) + task * op_.x.stride * bytes_of(op_.dtype);
      return step_loops().widen(x, op_.dtype, op_.in_features, x_.data() + task * op_.in_features);
    }
    step_loops().dense(op_, x_.data(), task * rows_, std::min((task + 1) * rows_, op_.out_features));
  }

 private:
  const Dense op_;
  const int64_t rows_;  // of W a task
  mutable std::vector<float> x_;
};

// A task is a slot, a key head and a share of the keys, so that a few heads of a long sequence busy all threads.
class Attend : public Phases {
 public:
  Attend(const Attention& op, int threads)
      : op_(op),
        shares_(std::clamp<int64_t>(ceil(threads, op.slots * op.kv_heads), 1, kMaxShares)),
        part_floats_(group(op) * (padded_head(op) + 2)),
        parts_(size_t(shares_ > 1 ? op.slots * op.kv_heads * shares_ * part_floats_ : 0)) {}
  int64_t phases() const override { return shares_ > 1 ? 2 : 1; }
  int64_t tasks(int64_t phase) const override { return op_.slots * op_.kv_heads * (phase == 0 ? shares_ : 1); }

  void run(int64_t phase, int64_t task) const override {
    if (phase == 1) {
      AttentionPart parts[kMaxShares];
      for (int64_t s = 0; s < shares_; ++s) parts[s] = part(parts_.data() + (task * shares_ + s) * part_floats_);
      return step_loops().combine(op_, task / op_.kv_heads, task % op_.kv_heads, parts, shares_);
    }
    const int64_t head = task / shares_, slot = head / op_.kv_heads, kv_head = head % op_.kv_heads;
    thread_local Scratch scratch;
    float* memory = scratch.get<float>(attend_floats(op_) + part_floats_);
    const AttentionPart sums = part(shares_ > 1 ? parts_.data() + task * part_floats_ : memory + attend_floats(op_));
    step_loops().attend(op_, slot, kv_head, task % shares_, shares_, memory, sums);
    if (shares_ == 1) step_loops().combine(op_, slot, kv_head, &sums, 1);
  }

 private:
  AttentionPart part(float* memory) const {
    float* largest = memory + group(op_) * padded_head(op_);
    return {memory, largest, largest + group(op_)};
  }

  const Attention op_;
  const int64_t shares_, part_floats_;
  mutable std::vector<float> parts_;
};

class GateUp : public Phases {
 public:
  explicit GateUp(const Gate& op) : op_(op), chunks_(ceil(op.width, kColumns)) {}
  int64_t phases() const override { return 1; }
  int64_t tasks(int64_t) const override { return op_.rows * chunks_; }
  void run(int64_t, int64_t task) const override {
    const int64_t first = task % chunks_ * kColumns;
    step_loops().gate(op_, task / chunks_, first, std::min(first + kColumns, op_.width));
  }

 private:
  const Gate op_;
  const int64_t chunks_;
};

class CapLogits : public Phases {
 public:
  explicit CapLogits(const SoftCap& op) : op_(op) {}
  int64_t phases() const override { return 1; }
  int64_t tasks(int64_t) const override { return ceil(op_.rows * op_.width, kColumns); }
  void run(int64_t, int64_t task) const override {
    step_loops().soft_cap(op_, task * kColumns, std::min((task + 1) * kColumns, op_.rows * op_.width));
  }

 private:
  const SoftCap op_;
};

class ChooseTokens : public Phases {
 public:
  explicit ChooseTokens(const Choose& op)
      : op_(op), chunks_(ceil(op.width, kScores)), peaks_(size_t(op.rows * chunks_)) {}
  int64_t phases() const override { return 2; }
  int64_t tasks(int64_t phase) const override { return phase == 0 ? op_.rows * chunks_ : op_.rows; }

  void run(int64_t phase, int64_t task) const override {
    if (phase == 0) {
      const int64_t chunk = task % chunks_;
      peaks_[size_t(task)] = step_loops().peak(scores(task / chunks_, chunk), op_.dtype, count(chunk));
      return;
    }
    const float* peaks = peaks_.data() + task * chunks_;
    int64_t best = 0;
    for (int64_t chunk = 1; chunk < chunks_ && peaks[best] == peaks[best]; ++chunk) {
      if (!(peaks[chunk] <= peaks[best])) best = chunk;
    }
    op_.tokens[task] = best * kScores + step_loops().find(scores(task, best), op_.dtype, count(best), peaks[best]);
  }

 private:
  int64_t count(int64_t chunk) const { return std::min(kScores, op_.width - chunk * kScores); }
  const void* scores(int64_t row, int64_t chunk) const {
    return static_cast<const char*>(op_.scores) + (row * op_.width + chunk * kScores) * bytes_of(op_.dtype);
  }

  const Choose op_;
  const int64_t chunks_;
  mutable std::vector<float> peaks_;
};

}  // namespace

const StepLoops& step_loops() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::kAvx512Vbmi:
    case InstructionSet::kAvx512:
      return avx512::kStepLoops;
    case InstructionSet::kAvx2:
      return avx2::kStepLoops;
    default:
      break;
  }
#endif
  return portable::kStepLoops;
}

void Step::append(std::unique_ptr<Phases> operation) {
  for (int64_t phase = 0; phase < operation->phases(); ++phase) phases_.push_back({operation.get(), phase});
  operations_.push_back(std::move(operation));
}

void Step::add(const Embed& operation) {
  embeds_.push_back(operation);
  append(std::make_unique<EmbedTokens>(operation));
}

void Step::add(const AddNorm& operation) { append(std::make_unique<AddAndNorm>(operation)); }
void Step::add(const Dense& operation) { append(std::make_unique<DenseProduct>(operation)); }
void Step::add(const Attention& operation) { append(std::make_unique<Attend>(operation, threads_)); }
void Step::add(const Gate& operation) { append(std::make_unique<GateUp>(operation)); }
void Step::add(const SoftCap& operation) { append(std::make_unique<CapLogits>(operation)); }
void Step::add(const Choose& operation) { append(std::make_unique<ChooseTokens>(operation)); }

void Step::add(const std::vector<Gemm>& products) {
  auto group = psumbook_products(products.data(), int(products.size()), threads_);
  products_.push_back(group.get());
  ready_ = false;
  append(std::move(group));
}

void Step::prepare() {
  std::lock_guard<std::mutex> lock(turn_);
  prepared_.resize(products_.size());
  int64_t sums = 0;
  for (const Products* each : products_) sums = std::max(sums, each->sums_floats());
  for (size_t i = 0; i < products_.size(); ++i) {
    products_[i]->prepare(prepared_[i].get<float>(products_[i]->prepared_floats()), sums_.get<float>(sums));
  }
  ready_ = true;
}

// The phases of all operations, one after the other.
class Replay : public Phases {
 public:
  explicit Replay(const std::vector<Step::Place>& places) : places_(places) {}
  int64_t phases() const override { return int64_t(places_.size()); }
  int64_t tasks(int64_t phase) const override {
    const auto& place = places_[size_t(phase)];
    return place.operation->tasks(place.phase);
  }
  void run(int64_t phase, int64_t task) const override {
    const auto& place = places_[size_t(phase)];
    place.operation->run(place.phase, task);
  }

 private:
  const std::vector<Step::Place>& places_;
};

void Step::run(int threads) {
  std::lock_guard<std::mutex> lock(turn_);
  if (!ready_) throw std::logic_error("products were added to this step since prepare() was called: call it again");
  for (const Embed& each : embeds_) {
    for (int64_t row = 0; row < each.rows; ++row) {
      if (each.tokens[row] >= 0 && each.tokens[row] < each.vocabulary) continue;
      throw std::out_of_range("token " + std::to_string(each.tokens[row]) + " is none of " +
                              std::to_string(each.vocabulary));
    }
  }
  parallel_phases(Replay(phases_), threads);
}

}  // namespace codegemm::cpu
