"""The tables of ``gguf_names``: facts of ``diffusers.loaders.single_file_utils`` 0.42, turned around.

``@ ours theirs``: what begins so (several such lines: each of them; ``-``: nothing); ``#`` is a number, ``!``
that of the last block. Then a line for each module, our name and theirs: what follows a name (``.weight``) is
kept. Names with commas are one tensor there, whose rows lie after each other; ``~``: its two halves of rows
change places.
"""

FLUX = """
@ time_text_embed -
timestep_embedder.linear_1  time_in.in_layer
timestep_embedder.linear_2  time_in.out_layer
text_embedder.linear_1      vector_in.in_layer
text_embedder.linear_2      vector_in.out_layer
guidance_embedder.linear_1  guidance_in.in_layer
guidance_embedder.linear_2  guidance_in.out_layer
@ transformer_blocks.# double_blocks.#
attn.to_q,attn.to_k,attn.to_v                    img_attn.qkv
attn.add_q_proj,attn.add_k_proj,attn.add_v_proj  txt_attn.qkv
attn.norm_q.weight                               img_attn.norm.query_norm.scale
attn.norm_k.weight                               img_attn.norm.key_norm.scale
attn.norm_added_q.weight                         txt_attn.norm.query_norm.scale
attn.norm_added_k.weight                         txt_attn.norm.key_norm.scale
attn.to_out.0                                    img_attn.proj
attn.to_add_out                                  txt_attn.proj
norm1.linear                                     img_mod.lin
norm1_context.linear                             txt_mod.lin
ff.net.0.proj                                    img_mlp.0
ff.net.2                                         img_mlp.2
ff_context.net.0.proj                            txt_mlp.0
ff_context.net.2                                 txt_mlp.2
@ single_transformer_blocks.# single_blocks.#
attn.to_q,attn.to_k,attn.to_v,proj_mlp  linear1
proj_out                                linear2
attn.norm_q.weight                      norm.query_norm.scale
attn.norm_k.weight                      norm.key_norm.scale
norm.linear                             modulation.lin
@ - -
context_embedder  txt_in
x_embedder        img_in
proj_out          final_layer.linear
norm_out.linear   ~final_layer.adaLN_modulation.1
"""
CHROMA = """
@ distilled_guidance_layer distilled_guidance_layer
layers.#.linear_1  layers.#.in_layer
layers.#.linear_2  layers.#.out_layer
norms.#.weight     norms.#.scale
in_proj            in_proj
out_proj           out_proj
"""
FLUX2 = """
@ time_guidance_embed -
timestep_embedder.linear_1  time_in.in_layer
timestep_embedder.linear_2  time_in.out_layer
text_embedder.linear_1      vector_in.in_layer
text_embedder.linear_2      vector_in.out_layer
guidance_embedder.linear_1  guidance_in.in_layer
guidance_embedder.linear_2  guidance_in.out_layer
@ transformer_blocks.# double_blocks.#
attn.to_q,attn.to_k,attn.to_v                    img_attn.qkv
attn.add_q_proj,attn.add_k_proj,attn.add_v_proj  txt_attn.qkv
attn.norm_q.weight                               img_attn.norm.query_norm.scale
attn.norm_k.weight                               img_attn.norm.key_norm.scale
attn.norm_added_q.weight                         txt_attn.norm.query_norm.scale
attn.norm_added_k.weight                         txt_attn.norm.key_norm.scale
attn.to_out.0                                    img_attn.proj
attn.to_add_out                                  txt_attn.proj
ff.linear_in                                     img_mlp.0
ff.linear_out                                    img_mlp.2
ff_context.linear_in                             txt_mlp.0
ff_context.linear_out                            txt_mlp.2
@ single_transformer_blocks.# single_blocks.#
attn.norm_q.weight    norm.query_norm.scale
attn.norm_k.weight    norm.key_norm.scale
attn.to_qkv_mlp_proj  linear1
attn.to_out           linear2
@ - -
context_embedder                     txt_in
x_embedder                           img_in
proj_out                             final_layer.linear
norm_out.linear                      ~final_layer.adaLN_modulation.1
double_stream_modulation_img.linear  double_stream_modulation_img.lin
double_stream_modulation_txt.linear  double_stream_modulation_txt.lin
single_stream_modulation.linear      single_stream_modulation.lin
"""
SD3 = """
@ transformer_blocks.! joint_blocks.!
norm1_context.linear  ~context_block.adaLN_modulation.1
@ transformer_blocks.# joint_blocks.#
attn.to_q,attn.to_k,attn.to_v                    x_block.attn.qkv
attn.add_q_proj,attn.add_k_proj,attn.add_v_proj  context_block.attn.qkv
attn.norm_q                                      x_block.attn.ln_q
attn.norm_k                                      x_block.attn.ln_k
attn.norm_added_q                                context_block.attn.ln_q
attn.norm_added_k                                context_block.attn.ln_k
attn.to_out.0                                    x_block.attn.proj
attn.to_add_out                                  context_block.attn.proj
attn2.to_q,attn2.to_k,attn2.to_v                 x_block.attn2.qkv
attn2.norm_q                                     x_block.attn2.ln_q
attn2.norm_k                                     x_block.attn2.ln_k
attn2.to_out.0                                   x_block.attn2.proj
norm1.linear                                     x_block.adaLN_modulation.1
norm1_context.linear                             context_block.adaLN_modulation.1
ff.net.0.proj                                    x_block.mlp.fc1
ff.net.2                                         x_block.mlp.fc2
ff_context.net.0.proj                            context_block.mlp.fc1
ff_context.net.2                                 context_block.mlp.fc2
@ time_text_embed -
timestep_embedder.linear_1  t_embedder.mlp.0
timestep_embedder.linear_2  t_embedder.mlp.2
text_embedder.linear_1      y_embedder.mlp.0
text_embedder.linear_2      y_embedder.mlp.2
@ - -
pos_embed.pos_embed  pos_embed
pos_embed.proj       x_embedder.proj
context_embedder     context_embedder
proj_out             final_layer.linear
norm_out.linear      ~final_layer.adaLN_modulation.1
"""
AURA = """
@ joint_transformer_blocks.# double_layers.#
ff.linear_1                mlpX.c_fc1
ff.linear_2                mlpX.c_fc2
ff.out_projection          mlpX.c_proj
ff_context.linear_1        mlpC.c_fc1
ff_context.linear_2        mlpC.c_fc2
ff_context.out_projection  mlpC.c_proj
norm1.linear               modX.1
norm1_context.linear       modC.1
attn.to_q                  attn.w2q
attn.to_k                  attn.w2k
attn.to_v                  attn.w2v
attn.to_out.0              attn.w2o
attn.add_q_proj            attn.w1q
attn.add_k_proj            attn.w1k
attn.add_v_proj            attn.w1v
attn.to_add_out            attn.w1o
@ single_transformer_blocks.# single_layers.#
ff.linear_1        mlp.c_fc1
ff.linear_2        mlp.c_fc2
ff.out_projection  mlp.c_proj
norm1.linear       modCX.1
attn.to_q          attn.w1q
attn.to_k          attn.w1k
attn.to_v          attn.w1v
attn.to_out.0      attn.w1o
@ - -
register_tokens          register_tokens
time_step_proj.linear_1  t_embedder.mlp.0
time_step_proj.linear_2  t_embedder.mlp.2
context_embedder         cond_seq_linear
proj_out                 final_linear
norm_out.linear          ~modF.1
pos_embed.pos_embed      positional_encoding
pos_embed.proj           init_x_linear
"""
HUNYUAN_VIDEO = """
@ context_embedder.token_refiner.refiner_blocks.# txt_in.individual_token_refiner.blocks.#
attn.to_q,attn.to_k,attn.to_v  self_attn_qkv
attn.to_out.0                  self_attn_proj
norm_out.linear                adaLN_modulation.1
ff.net.0.proj                  mlp.fc1
ff.net.2                       mlp.fc2
norm1                          norm1
norm2                          norm2
@ context_embedder txt_in
time_text_embed.timestep_embedder.linear_1  t_embedder.mlp.0
time_text_embed.timestep_embedder.linear_2  t_embedder.mlp.2
time_text_embed.text_embedder               c_embedder
proj_in                                     input_embedder
@ time_text_embed -
timestep_embedder.linear_1  time_in.mlp.0
timestep_embedder.linear_2  time_in.mlp.2
guidance_embedder.linear_1  guidance_in.mlp.0
guidance_embedder.linear_2  guidance_in.mlp.2
text_embedder.linear_1      vector_in.in_layer
text_embedder.linear_2      vector_in.out_layer
@ transformer_blocks.# double_blocks.#
norm1.linear                                     img_mod.linear
norm1_context.linear                             txt_mod.linear
attn.to_q,attn.to_k,attn.to_v                    img_attn_qkv
attn.add_q_proj,attn.add_k_proj,attn.add_v_proj  txt_attn_qkv
attn.norm_q                                      img_attn_q_norm
attn.norm_k                                      img_attn_k_norm
attn.norm_added_q                                txt_attn_q_norm
attn.norm_added_k                                txt_attn_k_norm
attn.to_out.0                                    img_attn_proj
attn.to_add_out                                  txt_attn_proj
ff.net.0.proj                                    img_mlp.fc1
ff.net.2                                         img_mlp.fc2
ff_context.net.0.proj                            txt_mlp.fc1
ff_context.net.2                                 txt_mlp.fc2
@ single_transformer_blocks.# single_blocks.#
attn.to_q,attn.to_k,attn.to_v,proj_mlp  linear1
proj_out                                linear2
attn.norm_q                             q_norm
attn.norm_k                             k_norm
norm.linear                             modulation.linear
@ - -
x_embedder       img_in
norm_out.linear  ~final_layer.adaLN_modulation.1
proj_out         final_layer.linear
"""
WAN = """
@ blocks.# blocks.#
@ vace_blocks.# vace_blocks.#
scale_shift_table   modulation
norm2               norm3
attn1.to_q          self_attn.q
attn1.to_k          self_attn.k
attn1.to_v          self_attn.v
attn1.to_out.0      self_attn.o
attn1.norm_q        self_attn.norm_q
attn1.norm_k        self_attn.norm_k
attn2.to_q          cross_attn.q
attn2.to_k          cross_attn.k
attn2.to_v          cross_attn.v
attn2.to_out.0      cross_attn.o
attn2.norm_q        cross_attn.norm_q
attn2.norm_k        cross_attn.norm_k
attn2.add_k_proj    cross_attn.k_img
attn2.add_v_proj    cross_attn.v_img
attn2.norm_added_k  cross_attn.norm_k_img
ffn.net.0.proj      ffn.0
ffn.net.2           ffn.2
proj_in             before_proj
proj_out            after_proj
@ condition_embedder -
time_embedder.linear_1        time_embedding.0
time_embedder.linear_2        time_embedding.2
text_embedder.linear_1        text_embedding.0
text_embedder.linear_2        text_embedding.2
time_proj                     time_projection.1
image_embedder.norm1          img_emb.proj.0
image_embedder.ff.net.0.proj  img_emb.proj.1
image_embedder.ff.net.2       img_emb.proj.3
image_embedder.norm2          img_emb.proj.4
@ - -
patch_embedding       patch_embedding
vace_patch_embedding  vace_patch_embedding
proj_out              head.head
scale_shift_table     head.modulation
"""
LUMINA2 = """
@ layers.# layers.#
@ context_refiner.# context_refiner.#
@ noise_refiner.# noise_refiner.#
norm1.linear                   adaLN_modulation.1
norm1.norm                     attention_norm1
norm1                          attention_norm1
norm2                          attention_norm2
attn.to_q,attn.to_k,attn.to_v  attention.qkv
attn.to_out.0                  attention.out
attn.norm_q                    attention.q_norm
attn.norm_k                    attention.k_norm
feed_forward.linear_1          feed_forward.w1
feed_forward.linear_2          feed_forward.w2
feed_forward.linear_3          feed_forward.w3
ffn_norm1                      ffn_norm1
ffn_norm2                      ffn_norm2
@ time_caption_embed -
caption_embedder            cap_embedder
timestep_embedder.linear_1  t_embedder.mlp.0
timestep_embedder.linear_2  t_embedder.mlp.2
@ - -
x_embedder         x_embedder
norm_out.linear_1  final_layer.adaLN_modulation.1
norm_out.linear_2  final_layer.linear
"""
Z_IMAGE = """
@ layers.# layers.#
@ noise_refiner.# noise_refiner.#
@ context_refiner.# context_refiner.#
attention.to_q,attention.to_k,attention.to_v  attention.qkv
attention.to_out.0                            attention.out
attention.norm_q                              attention.q_norm
attention.norm_k                              attention.k_norm
@ - -
all_final_layer.2-1  final_layer
all_x_embedder.2-1   x_embedder
"""
LTX = """
@ transformer_blocks.# transformer_blocks.#
attn1.norm_q  attn1.q_norm
attn1.norm_k  attn1.k_norm
attn2.norm_q  attn2.q_norm
attn2.norm_k  attn2.k_norm
@ - -
proj_in     patchify_proj
time_embed  adaln_single
"""
COSMOS = """
@ transformer_blocks.# blocks.#
norm1.linear_1  adaln_modulation_self_attn.1
norm1.linear_2  adaln_modulation_self_attn.2
norm2.linear_1  adaln_modulation_cross_attn.1
norm2.linear_2  adaln_modulation_cross_attn.2
norm3.linear_1  adaln_modulation_mlp.1
norm3.linear_2  adaln_modulation_mlp.2
attn1.to_q      self_attn.q_proj
attn1.to_k      self_attn.k_proj
attn1.to_v      self_attn.v_proj
attn1.to_out.0  self_attn.output_proj
attn1.norm_q    self_attn.q_norm
attn1.norm_k    self_attn.k_norm
attn2.to_q      cross_attn.q_proj
attn2.to_k      cross_attn.k_proj
attn2.to_v      cross_attn.v_proj
attn2.to_out.0  cross_attn.output_proj
attn2.norm_q    cross_attn.q_norm
attn2.norm_k    cross_attn.k_norm
ff.net.0.proj   mlp.layer1
ff.net.2        mlp.layer2
@ - -
time_embed.t_embedder  t_embedder.1
time_embed.norm        t_embedding_norm
patch_embed.proj       x_embedder.proj.1
norm_out.linear_1      final_layer.adaln_modulation.1
norm_out.linear_2      final_layer.adaln_modulation.2
proj_out               final_layer.linear
"""
CHROMA += FLUX
LTX2 = """
@ transformer_blocks.#.attn1 transformer_blocks.#.attn1
@ transformer_blocks.#.attn2 transformer_blocks.#.attn2
@ transformer_blocks.#.audio_attn1 transformer_blocks.#.audio_attn1
@ transformer_blocks.#.audio_attn2 transformer_blocks.#.audio_attn2
@ transformer_blocks.#.audio_to_video_attn transformer_blocks.#.audio_to_video_attn
@ transformer_blocks.#.video_to_audio_attn transformer_blocks.#.video_to_audio_attn
norm_q  q_norm
norm_k  k_norm
@ transformer_blocks.# transformer_blocks.#
video_a2v_cross_attn_scale_shift_table  scale_shift_table_a2v_ca_video
audio_a2v_cross_attn_scale_shift_table  scale_shift_table_a2v_ca_audio
@ - -
proj_in                          patchify_proj
audio_proj_in                    audio_patchify_proj
time_embed                       adaln_single
audio_time_embed                 audio_adaln_single
av_cross_attn_video_scale_shift  av_ca_video_scale_shift_adaln_single
av_cross_attn_video_a2v_gate     av_ca_a2v_gate_adaln_single
av_cross_attn_audio_scale_shift  av_ca_audio_scale_shift_adaln_single
av_cross_attn_audio_v2a_gate     av_ca_v2a_gate_adaln_single
"""
QWEN_IMAGE21 = """
@ transformer_blocks.# transformer_blocks.#
img_mlp.gate_layer,img_mlp.proj  img_mlp.gate_up
"""
# llama.cpp's names, which ComfyUI-GGUF turns back (its loader.py, T5_SD_MAP)
T5 = """
@ encoder.block.# enc.blk.#
layer.0.SelfAttention.q                        attn_q
layer.0.SelfAttention.k                        attn_k
layer.0.SelfAttention.v                        attn_v
layer.0.SelfAttention.o                        attn_o
layer.0.SelfAttention.relative_attention_bias  attn_rel_b
layer.0.layer_norm                             attn_norm
layer.1.DenseReluDense.wi_0                    ffn_gate
layer.1.DenseReluDense.wi_1                    ffn_up
layer.1.DenseReluDense.wo                      ffn_down
layer.1.layer_norm                             ffn_norm
@ - -
shared                    token_embd
encoder.final_layer_norm  enc.output_norm
"""
