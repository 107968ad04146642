// Inner loops of optimizer_step.cpp, included once for each instruction set inside a namespace of its own, after
// `Vector` (vector.h).
// No lambdas, no standard library: their code would be compiled for this instruction set and linked into the others.
//
// Multiplications and additions are fused where torch's own fused CPU steps, as they are built, fuse them: where the
// processor does that, results are equal to the last bit.

struct Sgd {
  Vector::Type rate, momentum, share, weight_decay, sign;
  bool has_decay, has_momentum, nesterov;

  Sgd(const SgdSettings& s, const OptimizedWeight&)
      : rate(Vector::broadcast(static_cast<float>(-s.rate))),
        momentum(Vector::broadcast(static_cast<float>(s.momentum))),
        share(Vector::broadcast(static_cast<float>(1 - s.dampening))),
        weight_decay(Vector::broadcast(static_cast<float>(s.weight_decay))),
        sign(Vector::broadcast(s.maximize ? -1.0f : 1.0f)),
        has_decay(s.weight_decay != 0),
        has_momentum(s.momentum != 0),
        nesterov(s.nesterov) {}

  void operator()(float* weight, const float* grad, uint32_t lanes, float* first, float*) const {
    const Vector::Type w = Vector::load(weight);
    Vector::Type g = Vector::mul(Vector::load_lanes(grad, lanes), sign);
    if (has_decay) g = Vector::fma(w, weight_decay, g);
    if (has_momentum) {
      const Vector::Type buffer = Vector::fma(g, share, Vector::mul(Vector::load(first), momentum));
      Vector::store(first, buffer);
      g = nesterov ? Vector::fma(buffer, momentum, g) : buffer;
    }
    Vector::store(weight, Vector::fma(g, rate, w));
  }
};

struct Adamw {
  Vector::Type decay, lerp, beta2, share, rate, correction, epsilon, sign;
  bool has_decay, from_gradient;

  Adamw(const AdamwSettings& s, const OptimizedWeight& w)
      : decay(Vector::broadcast(static_cast<float>(1 - s.rate * s.weight_decay))),
        beta2(Vector::broadcast(static_cast<float>(s.beta2))),
        share(Vector::broadcast(static_cast<float>(1 - s.beta2))),
        rate(Vector::broadcast(static_cast<float>(-s.rate / (1 - __builtin_pow(s.beta1, w.step))))),
        correction(Vector::broadcast(static_cast<float>(__builtin_sqrt(1 - __builtin_pow(s.beta2, w.step))))),
        epsilon(Vector::broadcast(static_cast<float>(s.epsilon))),
        sign(Vector::broadcast(s.maximize ? -1.0f : 1.0f)),
        has_decay(s.weight_decay != 0) {
    const float distance = static_cast<float>(1 - s.beta1);
    from_gradient = distance >= 0.5f;  // the interpolation starts from the nearer end
    lerp = Vector::broadcast(from_gradient ? distance - 1 : distance);
  }

  void operator()(float* weight, const float* grad, uint32_t lanes, float* first, float* second) const {
    const Vector::Type g = Vector::mul(Vector::load_lanes(grad, lanes), sign);
    Vector::Type w = Vector::load(weight);
    if (has_decay) w = Vector::rounded(Vector::mul(w, decay));
    Vector::Type mean = Vector::load(first);
    mean = Vector::fma(lerp, Vector::sub(g, mean), from_gradient ? g : mean);
    const Vector::Type squares = Vector::fma(Vector::mul(share, g), g, Vector::mul(Vector::load(second), beta2));
    Vector::store(first, mean);
    Vector::store(second, squares);
    const Vector::Type scale = Vector::add(Vector::div(Vector::sqrt(squares), correction), epsilon);
    Vector::store(weight, Vector::add(w, Vector::div(Vector::mul(rate, mean), scale)));
  }
};

inline void copy(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <class Rule>
void step_piece(const Rule& rule, float* weight, const float* grad, uint32_t lanes, float* first, float* second) {
  for (int64_t i = 0; i < kPiece; i += Vector::kWidth)
    rule(weight + i, grad + i, lanes >> i, first + i, second + i);
}

// Pieces [begin, end) of a weight's list.
template <class Rule, class Settings>
void step_pieces(const OptimizedWeight& w, const Settings& settings, int64_t begin, int64_t end) {
  // Pieces lie too far apart for the processor to guess the next; into the second-level cache, since that is what can
  // wait for more of them than the first.
  constexpr int64_t kAhead = 32;
  const Rule rule(settings, w);
  const ActivePiece* pieces = w.pieces->list.data();
  float unused[kPiece] = {};  // in place of state that the rule has none of
  for (int64_t k = begin; k < end; ++k) {
    if (k + kAhead < end) {
      const int64_t next = pieces[k + kAhead].index * kPiece;
      __builtin_prefetch(w.weight + next, 0, 2);
      __builtin_prefetch(w.grad + next, 0, 2);
      if (w.first) __builtin_prefetch(w.first + next, 0, 2);
      if (w.second) __builtin_prefetch(w.second + next, 0, 2);
    }
    const int64_t offset = pieces[k].index * kPiece, left = w.size - offset;
    float* first = w.first ? w.first + offset : unused;
    float* second = w.second ? w.second + offset : unused;
    if (left >= kPiece) {
      step_piece(rule, w.weight + offset, w.grad + offset, pieces[k].lanes, first, second);
      continue;
    }
    // The end of a weight is stepped in a copy, with zeros behind it.
    float tail[4][kPiece] = {};
    copy(w.weight + offset, left, tail[0]);
    copy(w.grad + offset, left, tail[1]);
    copy(first, left, tail[2]);
    copy(second, left, tail[3]);
    step_piece(rule, tail[0], tail[1], pieces[k].lanes, tail[2], tail[3]);
    copy(tail[0], left, w.weight + offset);
    copy(tail[2], left, first);
    copy(tail[3], left, second);
  }
}

void sgd_pieces(const OptimizedWeight& w, const SgdSettings& settings, int64_t begin, int64_t end) {
  step_pieces<Sgd>(w, settings, begin, end);
}

void adamw_pieces(const OptimizedWeight& w, const AdamwSettings& settings, int64_t begin, int64_t end) {
  step_pieces<Adamw>(w, settings, begin, end);
}
